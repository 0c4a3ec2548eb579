"""Checkpoints of other systems, converted from and to ``checkpoint.contents.Contents``."""
