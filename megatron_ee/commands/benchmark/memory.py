"""``megatron-ee benchmark memory``."""

from __future__ import annotations

import argparse

from megatron_ee.commands import at_least
from megatron_ee.commands.benchmark.options import SHAPES, show, step_of, step_options

DESCRIPTION = """Run tuning steps on a random model over processes that this command starts by itself, and compare what
each holds at its peak with the plan that a run prints before it starts."""
HELP = "each rank's memory against the plan's"


def add_options(options: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    options.add_argument(
        "--shape", choices=SHAPES, default="small", help="what the options below start from (default: small)"
    )
    options.add_argument("--tensor", type=at_least(1), default=1, metavar="N", help="ranks per layer (default: 1)")
    options.add_argument("--pipeline", type=at_least(1), default=1, metavar="N", help="pipeline stages (default: 1)")
    options.add_argument("--sequence-parallel", action="store_true", help="on top of --tensor")
    options.add_argument(
        "--resident",
        action="store_true",
        help="also count freed memory that the C library keeps, which depends on the sizes of single tensors",
    )
    step_options(options, None)


def run(arguments: argparse.Namespace) -> int:
    """Measure; a table or JSON to stdout."""
    from megatron_ee.benchmark.memory import benchmark_memory
    from megatron_ee.benchmark.report import print_memory

    step = step_of(
        arguments,
        SHAPES[arguments.shape],
        stages=arguments.pipeline,
        tensor=arguments.tensor,
        sequence_parallel=arguments.sequence_parallel,
    )
    result = benchmark_memory(step, steps=arguments.steps, resident=arguments.resident)
    return show(result, print_memory, arguments.json)
