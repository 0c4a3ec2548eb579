"""``megatron-ee benchmark tune``."""

from __future__ import annotations

import argparse

from megatron_ee.commands import DTYPES, at_least
from megatron_ee.commands.benchmark.options import adder, repeats_option, shape_of, shape_options, show

DESCRIPTION = """Time the tuning step against plain PyTorch doing the same work (the transformers model frozen, the same
exits as ordinary modules), and the exit loss alone against torch's own, interleaved, on a random model made for
this."""
HELP = "the tuning step and its loss"
SHAPE = {"hidden": 768, "layers": 12, "vocab": 32000}


def add_options(options: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    whole = at_least(1)
    shape_options(adder(options, SHAPE))
    options.add_argument(
        "--sequence-length", type=at_least(2), default=2048, metavar="N", help="tokens per step (default: 2048)"
    )
    options.add_argument(
        "--exits",
        type=whole,
        nargs="+",
        default=[4, 8],
        metavar="N",
        help="numbers of exits, spread over 3/4 of the depth (default: 4 8)",
    )
    options.add_argument(
        "--dtype", choices=DTYPES, nargs="+", default=["bfloat16", "float32"], help="dtypes (default: both)"
    )
    options.add_argument(
        "--chunk-tokens",
        type=whole,
        default=512,
        metavar="N",
        help="tokens whose logits exist at once (default: 512; ours takes 256 at most on a CPU)",
    )
    repeats_option(options)


def run(arguments: argparse.Namespace) -> int:
    """Measure; a table or JSON to stdout."""
    from megatron_ee.benchmark.report import print_tune
    from megatron_ee.benchmark.tune import benchmark_tune

    result = benchmark_tune(
        shape_of(arguments, SHAPE),
        tokens=arguments.sequence_length,
        exits=arguments.exits,
        dtypes=arguments.dtype,
        repeats=arguments.repeats,
        chunk_tokens=arguments.chunk_tokens,
    )
    return show(result, print_tune, arguments.json)
