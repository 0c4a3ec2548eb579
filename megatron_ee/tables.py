"""Tables: with rules on a terminal, plain columns elsewhere; and counted words in them.

Nothing is cut. Where space is short, headings break between words. A table that is still too wide is printed in parts,
each with the first columns of words again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TextIO

from megatron_ee.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

PLAIN_WIDTH = 160  # width in characters of a table that goes to a file or a pipe
LONGEST_WORD = 24  # longer words of a column of words, such as paths, may break


@dataclass
class Column:
    """A column: of numbers, which stand at the right and never break, or of ``words``."""

    name: str
    words: bool
    cells: list[str] = field(default_factory=list)

    def widths(self, *, whole: bool) -> tuple[int, int]:
        """The least and the most characters that it wants. ``whole``: short cells of words keep to one line."""
        from rich.cells import cell_len

        lines = [line for cell in self.cells for line in cell.split("\n")]
        widest = max(map(cell_len, lines), default=0)
        heading = max(map(cell_len, self.name.split()), default=0)
        longest = widest
        if self.words:
            parts = lines if whole else [word for line in lines for word in line.split()]
            longest = min(max(map(cell_len, parts), default=0), LONGEST_WORD)
        return max(heading, longest), max(cell_len(self.name), widest)


@dataclass
class Table:
    """A table for ``console.print``.

    Attributes:
        title: above it.
        ruled: whether it has rules, for a terminal.
        columns: see ``add_columns``.
        styles: of the rows.
    """

    title: str
    ruled: bool
    columns: list[Column] = field(default_factory=list)
    styles: list[str | None] = field(default_factory=list)

    def add_row(self, *cells: str, style: str | None = None) -> None:
        """Add a row with a cell for each column. A cell may have several lines."""
        for column, cell in zip(self.columns, cells, strict=True):
            column.cells.append("\n".join(map(printable, cell.split("\n"))))
        self.styles.append(style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The parts that fit into the width of the console."""
        for number, (columns, widths) in enumerate(self._parts(options.max_width)):
            if number and not self.ruled:
                yield ""
            yield self._part("" if number else self.title, columns, widths)

    def _parts(self, width: int) -> Iterator[tuple[list[Column], list[int]]]:
        """The columns of each part, and their widths."""
        words = next((place for place, each in enumerate(self.columns) if not each.words), 1)
        keys, rest = self.columns[: max(1, words)], self.columns[max(1, words) :]
        count = len(rest)
        while count > 1 and not _fits(keys, rest[:count], self._room(len(keys) + count, width)):
            count -= 1
        yield [*keys, *rest[:count]], _widths(keys, rest[:count], self._room(len(keys) + count, width))
        if count < len(rest):
            yield from replace(self, columns=[*keys, *rest[count:]])._parts(width)

    def _room(self, columns: int, width: int) -> int:
        """Characters for the cells of so many columns."""
        return width - (2 * columns + 1 if self.ruled else 2 * columns)

    def _part(self, title: str, columns: Sequence[Column], widths: Sequence[int]) -> RenderableType:
        from rich import box
        from rich.table import Table as RichTable

        found = RichTable(
            title=printable(title) or None,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD if self.ruled else None,
            padding=(0, 1, 0, 0) if self.ruled else (0, 2, 0, 0),
        )
        for column, width in zip(columns, widths, strict=True):
            found.add_column(column.name, justify="left" if column.words else "right", width=width, overflow="fold")
        for row, style in enumerate(self.styles):
            found.add_row(*(column.cells[row] for column in columns), style=style)
        return found


def counted(number: int, one: str, more: str | None = None) -> str:
    """Such as ``1 exit`` and ``1,024 exits``; ``more``: the plural, if it is not ``one`` with an s."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def make_console(file: TextIO | None = None) -> Console:
    """A console on ``file`` (default: stdout), as wide as the terminal, or ``PLAIN_WIDTH`` without one."""
    from rich.console import Console

    # [name] and :name: are text, not rich markup or emoji
    console = Console(file=file or sys.stdout, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def new_table(title: str, console: Console) -> Table:
    """A table without columns, in the style that suits ``console``."""
    return Table(title, console.is_terminal)


def add_columns(table: Table, *names: str, words: bool = False) -> None:
    """Columns of numbers, or of ``words``. Before the first row."""
    table.columns.extend(Column(name, words) for name in names)


def _fits(keys: Sequence[Column], others: Sequence[Column], room: int) -> bool:
    return sum(least for least, _ in _wanted(keys, others)) <= room


def _wanted(keys: Sequence[Column], others: Sequence[Column]) -> list[tuple[int, int]]:
    return [column.widths(whole=True) for column in keys] + [column.widths(whole=False) for column in others]


def _widths(keys: Sequence[Column], others: Sequence[Column], room: int) -> list[int]:
    """Of each column in ``room`` characters: what is left over goes to those that lack most."""
    columns, wanted = [*keys, *others], _wanted(keys, others)
    widths = [least for least, _ in wanted]
    while sum(widths) > room:  # words break before numbers are cut
        breakable = [index for index, each in enumerate(columns) if each.words and widths[index] > 1]
        if not breakable:
            break
        widths[max(breakable, key=lambda index: widths[index])] -= 1
    while sum(widths) < room:
        lacking = max(range(len(widths)), key=lambda index: wanted[index][1] - widths[index])
        if widths[lacking] >= wanted[lacking][1]:
            break
        widths[lacking] += 1
    return widths
