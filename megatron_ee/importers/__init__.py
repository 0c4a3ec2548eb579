"""Checkpoints of other systems, read from and written to the package's own description of a checkpoint."""
