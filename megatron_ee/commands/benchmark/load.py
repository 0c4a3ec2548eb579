"""``megatron-ee benchmark load``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ee.commands import DTYPES, at_least
from megatron_ee.commands.benchmark.options import repeats_option, show

DESCRIPTION = """Time loading a released model against reading the same bytes, and the hashing that comes on top."""
HELP = "loading a released model"


def add_options(options: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    source = options.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory")
    source.add_argument(
        "--size-mb", type=at_least(1), default=1000, metavar="N", help="or a random one of this size (default: 1000)"
    )
    options.add_argument("--dtype", choices=DTYPES, help="dtype to load in (default: as it is stored)")
    repeats_option(options)


def run(arguments: argparse.Namespace) -> int:
    """Measure; a table or JSON to stdout."""
    from megatron_ee.benchmark.load import benchmark_load
    from megatron_ee.benchmark.report import print_load

    result = benchmark_load(
        arguments.model, megabytes=arguments.size_mb, dtype=arguments.dtype, repeats=arguments.repeats
    )
    return show(result, print_load, arguments.json)
