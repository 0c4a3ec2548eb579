"""Options of the commands that generate text: sampling, and the engine."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_ee.commands import at_least
from megatron_ee.errors import ConfigError

MOST_GIGABYTES = 1e9  # bytes fit an int64


def add_sampling(group: Any) -> None:
    """How tokens are chosen, and how many outputs a prompt gets."""
    add = group.add_argument
    add("--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; 0: greedy (default)")
    add(
        "--top-k",
        type=at_least(0),
        default=0,
        metavar="N",
        help="sample from the N most probable tokens; 0: all (default)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most probable tokens with total probability P (default: 1)",
    )
    add("--min-p", type=float, default=0.0, metavar="P", help="exclude tokens below P times the largest probability")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: penalise repeated tokens (default: 1)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)")
    add("--samples", type=at_least(1), default=1, metavar="N", help="outputs per prompt (default: 1)")


def add_engine(group: Any) -> None:
    """Over how many processes the model runs, and how many sequences at a time."""
    add = group.add_argument
    add("--tensor", type=at_least(1), default=1, metavar="N", help="tensor-parallel size (default: 1)")
    add("--pipeline", type=at_least(1), default=1, metavar="N", help="pipeline stages (default: 1)")
    add(
        "--kv-memory",
        type=_gigabytes,
        metavar="GB",
        help="memory for the KV cache, per process (default: half of the free memory)",
    )
    add(
        "--max-num-seqs",
        "--batch-size",
        type=at_least(1),
        default=16,
        metavar="N",
        help="largest number of sequences that run together (default: 16)",
    )


def as_option(error: ConfigError) -> ConfigError:
    """The error with the option's name in place of the request's field. Errors of a file's line stay unchanged."""
    if error.common:
        return error
    field, colon, rest = str(error).partition(":")
    named = ConfigError(f"--{field.replace('_', '-').replace('.', '-')}:{rest}" if colon else str(error))
    named.common = True
    return named


def _gigabytes(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST_GIGABYTES:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1e9, not {text!r}")
    return int(value * 1e9)
