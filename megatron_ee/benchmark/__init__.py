"""Measurements against what one would otherwise run, on the same machine and interleaved in one run.

``tune`` and ``loading`` drive them from a process that stays small; each side works in a child process of its own.
"""
