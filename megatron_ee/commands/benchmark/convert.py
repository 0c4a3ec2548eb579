"""``megatron-ee benchmark convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ee.commands import at_least
from megatron_ee.commands.benchmark.options import SHAPES, adder, json_option, shape_of, shape_options, show

DESCRIPTION = """Make a random bfloat16 model on disk, convert it to a parallel checkpoint and back, each in a process
of its own, and compare time with `cp` and SHA-256 of the same bytes; load both on two tensor-parallel ranks, and
compare with reading the bytes that each needs; save a random state in the background and on the spot."""
HELP = "conversions and their loading against plain copies and reads"
PARTS = ("convert", "load", "save")


def add_options(options: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    options.add_argument(
        "--parts", choices=PARTS, nargs="+", default=list(PARTS), help="what to measure (default: everything)"
    )
    options.add_argument(
        "--directory", type=Path, metavar="DIR", help="on the disk to measure (default: where temporary files go)"
    )
    options.add_argument(
        "--shape", choices=SHAPES, default="small", help="what the options below start from (default: small)"
    )
    shape_options(adder(options, None))
    options.add_argument(
        "--load-layers",
        type=at_least(2),
        metavar="N",
        help="layers of the model that is loaded (default: all, or as many as fit the memory twice)",
    )
    options.add_argument(
        "--save-mb", type=at_least(1), default=500, metavar="N", help="size of the state that is saved (default: 500)"
    )
    options.add_argument(
        "--repeats",
        type=at_least(1),
        metavar="N",
        help="measurements of each, the median counts (default: 3 for --shape small, else 1)",
    )
    json_option(options)


def run(arguments: argparse.Namespace) -> int:
    """Measure; a table or JSON to stdout."""
    from megatron_ee.benchmark.convert import benchmark_convert
    from megatron_ee.benchmark.report import print_convert

    result = benchmark_convert(
        shape_of(arguments, SHAPES[arguments.shape]),
        parts=arguments.parts,
        directory=arguments.directory,
        load_layers=arguments.load_layers,
        save_megabytes=arguments.save_mb,
        repeats=arguments.repeats or (3 if arguments.shape == "small" else 1),
    )
    return show(result, print_convert, arguments.json)
