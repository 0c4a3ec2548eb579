"""``megatron-ee benchmark pipeline``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ee.commands import at_least
from megatron_ee.commands.benchmark.options import SMALL, show, step_of, step_options

DESCRIPTION = """Run tuning steps on a random model in pipeline stages, one process of one CPU thread each, which this
command starts by itself; report the share of the time in which each stage computes, against M / (M + P - 1) and against
the plan, and the bytes that each link carries, against the least possible."""
HELP = "how busy pipeline stages are, and what travels between them"
PLOTS = (".png", ".pdf", ".svg")


def add_options(options: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    options.add_argument("--stages", type=at_least(1), default=2, metavar="N", help="pipeline stages (default: 2)")
    options.add_argument(
        "--simulated",
        action="store_true",
        help="measure each stage's work alone first, then let it wait that long instead: for more stages than cores",
    )
    options.add_argument(
        "--plot", type=_picture, metavar="FILE", help="draw what each stage does in a step: .png, .pdf or .svg"
    )
    step_options(options, SMALL)


def run(arguments: argparse.Namespace) -> int:
    """Measure; a table or JSON to stdout."""
    from megatron_ee.benchmark.pipeline import benchmark_pipeline
    from megatron_ee.benchmark.report import print_pipeline

    if arguments.plot is not None:
        from megatron_ee.checkpoint.ownership import check_file

        check_file(arguments.plot, "--plot")
    step = step_of(arguments, SMALL, stages=arguments.stages)
    result = benchmark_pipeline(step, steps=arguments.steps, simulated=arguments.simulated)
    if arguments.plot is not None:
        from megatron_ee.benchmark.timeline import plot_timeline

        plot_timeline(result, arguments.plot)
    return show(result, print_pipeline, arguments.json)


def _picture(text: str) -> Path:
    """An argparse type: a file that a plot can be saved to."""
    if not text.lower().endswith(PLOTS):
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(PLOTS)}, not {text!r}")
    return Path(text)
