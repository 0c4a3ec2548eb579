"""Lines for the operator."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Print a line on stderr, as the server's."""
    print(f"megatron-ee serve: {line}", file=sys.stderr, flush=True)
