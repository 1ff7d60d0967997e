"""Save, restore, keep and average checkpoints."""
