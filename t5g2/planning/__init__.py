"""What a recipe needs on a machine that is not there: FLOPs, memory, communication, time."""
