"""Tables: with rules on a terminal, plain columns elsewhere; and counted words in them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAIN_WIDTH = 160  # width in characters of a table that goes to a file or a pipe


def counted(number: int, one: str, more: str | None = None) -> str:
    """Such as ``1 exit`` and ``1,024 exits``; ``more``: the plural, if it is not ``one`` with an s."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def make_console(file: TextIO | None = None) -> Console:
    """A console on ``file`` (default: stdout), as wide as the terminal, or ``PLAIN_WIDTH`` without one."""
    from rich.console import Console

    console = Console(file=file or sys.stdout, highlight=False, markup=False)  # [name] is text, not rich markup
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def new_table(title: str, console: Console) -> Table:
    """A table without columns, in the style that suits ``console``."""
    from rich import box
    from rich.table import Table

    ruled = console.is_terminal
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if ruled else None,
        padding=(0, 1, 0, 0) if ruled else (0, 2, 0, 0),
    )


def add_columns(table: Table, *names: str, words: bool = False) -> None:
    """Columns of numbers, or of ``words``."""
    # If space is short, headings break between words; words and numbers are not cut.
    for name in names:
        longest = max(len(word) for word in name.split())
        table.add_column(name, justify="left" if words else "right", min_width=longest)
