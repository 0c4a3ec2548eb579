"""``megatron-ee benchmark``: what this does against what one would otherwise run, and against the plan."""

from __future__ import annotations

import argparse

from megatron_ee.commands import Parser
from megatron_ee.commands.benchmark import convert, generate, load, memory, pipeline, tune

KINDS = {
    "tune": tune,
    "load": load,
    "pipeline": pipeline,
    "memory": memory,
    "convert": convert,
    "generate": generate,
}


class _Nested(Parser):
    """The parser of one kind of measurement, as argparse makes it."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog.removeprefix("megatron-ee "), description)


def parser() -> argparse.ArgumentParser:
    """The command line; ``what`` is the kind of measurement."""
    about = "Compare with what one would otherwise run, or with the plan, on this machine; prints ratios."
    result = Parser("benchmark", about)
    kinds = result.add_subparsers(dest="what", required=True, metavar=f"{{{','.join(KINDS)}}}", parser_class=_Nested)
    for name, kind in KINDS.items():
        kind.add_options(kinds.add_parser(name, help=kind.HELP, description=kind.DESCRIPTION))
    return result


def run(arguments: argparse.Namespace) -> int:
    """Measure; a table or JSON to stdout."""
    return KINDS[arguments.what].run(arguments)
