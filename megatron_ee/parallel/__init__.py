"""Processes: their groups, and data parallelism over the exits' parameters."""
