"""``megatron-ee exits-report``: what a server's exit logs say of each task and day."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_ee.commands import Parser

DESCRIPTION = """Read exit logs of serve, plain or compressed with gzip, and say by task and day (UTC) how many layers
tokens took, where they left, what certificates covered, how long answers took, and what audits found."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("exits-report", DESCRIPTION)
    result.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="exit logs, JSON lines, plain or .gz")
    result.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    result.add_argument("--plot", type=Path, metavar="FILE", help="plot the days to a .png, .pdf or .svg file")
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print tables or JSON to stdout, and write the requested plot."""
    from megatron_ee.commands.inputs import check_input
    from megatron_ee.evaluation.figure import check_plot
    from megatron_ee.serving.exit_log import read_logs
    from megatron_ee.serving.exits_report import exit_figures, plot_exits, print_exits, report_json

    if arguments.plot is not None:
        check_plot(arguments.plot, "--plot")
    check_input("LOG", *arguments.logs)
    figures = exit_figures(read_logs(arguments.logs))
    if arguments.json:
        print(json.dumps(report_json(figures)))
    else:
        print_exits(figures)
    if arguments.plot is not None and figures:
        plot_exits(figures, arguments.plot)
    elif arguments.plot is not None:
        print(f"megatron-ee exits-report: the logs have no requests, so no {arguments.plot}", file=sys.stderr)
    return 0
