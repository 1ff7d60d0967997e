"""Train state, step, losses, schedule, optimizer."""
