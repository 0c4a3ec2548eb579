"""The commands of ``megatron-ee``: each module has ``parser()`` and ``run(arguments)``, and imports late in ``run``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megatron_ee.errors import ConfigError

DTYPES = ("float32", "bfloat16")
MODEL_DTYPES = ("auto", *DTYPES)
WEIGHTS = ("packed", "expanded")
RESIDENCIES = ("device", "host", "disk")
QUANTISE = ("none", "int8", "int4")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without the usage, and accepts no abbreviated options."""

    def __init__(self, command: str = "", description: str = "", *, prog: str = "") -> None:
        # add_subparsers passes ``prog`` to the parsers that it creates.
        super().__init__(prog=prog or f"megatron-ee {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError: the command line could not be understood."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers of at least ``least``."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return number


def add_files(group: Any, option: str, help_: str, metavar: str = "FILE") -> None:
    """An option that takes one or more files, and may be repeated."""
    group.add_argument(option, type=Path, nargs="+", action="extend", default=[], metavar=metavar, help=help_)
