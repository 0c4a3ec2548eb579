"""``megatron-ee doctor``: what works on this machine, what does not, and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from megatron_ee.commands import Parser

DESCRIPTION = """Check what this machine offers: libraries, GPU, compilers, memory, disk, file locks, ports. Nothing is
sent over a network. Exit status: 0 if tuning and generating work, with or without warnings; 1 if something that they
need is missing or broken."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("doctor", DESCRIPTION)
    result.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where runs will write: its file system is checked (default: the current directory)",
    )
    result.add_argument(
        "--build",
        action="store_true",
        help="also compile now what is compiled at its first use: DeepSpeed's CPU Adam, a test of torch.compile",
    )
    result.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return result


def run(arguments: argparse.Namespace) -> int:
    """Check, and print the findings to stdout; 1 if one of them is an error."""
    from megatron_ee.commands.machine import check_machine

    findings = check_machine(arguments.output, build=arguments.build)
    works = not any(finding.severity == "error" for finding in findings)
    if arguments.json:
        print(json.dumps({"works": works, "findings": [dataclasses.asdict(finding) for finding in findings]}))
        return 0 if works else 1
    from megatron_ee.tables import add_columns, make_console, new_table

    console = make_console()
    table = new_table("This machine", console)
    add_columns(table, "state", "checked", "found", words=True)
    for finding in findings:
        table.add_row(finding.severity, finding.name, finding.found)
        if finding.advice:
            table.add_row("", "", f"-> {finding.advice}")
    console.print(table)
    console.print("tuning and generating work here" if works else "tuning does not work here: see the errors")
    return 0 if works else 1
