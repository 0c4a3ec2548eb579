"""What a page consists of: sections with blocks. The template knows how each kind of block is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_ee.evaluation.page.svg import Look


@dataclass(frozen=True)
class Paragraph:
    """A paragraph.

    Attributes:
        text: in the page's language.
        style: "" or ``lead``, ``note``, ``explain`` (a boxed explanation), ``verdict`` (a result in one sentence).
    """

    kind: ClassVar[str] = "paragraph"
    text: str
    style: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: its first line.
        below: a smaller second line.
        mark: "" or ``bad``, ``good``, ``chosen``. The text says the same as its colour.
        share: width of a bar behind the text, in [0, 1]; None for no bar.
        own: whether the text is of a file, so that its direction is its own.
    """

    text: str
    below: str = ""
    mark: str = ""
    share: float | None = None
    own: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table. The first column names the rows.

    Attributes:
        caption: what it shows.
        columns: headings.
        rows: cells by row.
        words: numbers of the columns that hold words, from 0; the others hold numbers.
        chosen: number of the row that stands out; None for none.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: Sequence[int] = (0,)
    chosen: int | None = None


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        svg: its markup, which is trusted.
        caption: what it shows.
        alt: what can be seen in it, for those who cannot see it.
        legend: how each series looks, and its name.
    """

    kind: ClassVar[str] = "picture"
    svg: str
    caption: str
    alt: str
    legend: Sequence[tuple[Look, str]] = ()


@dataclass(frozen=True)
class FactList:
    """Names and values.

    Attributes:
        items: name, value and a further line for each.
    """

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Card:
    """One of the first figures of the page.

    Attributes:
        label: what it is.
        value: large.
        text: what it means, in a sentence.
        mark: as of a ``Cell``.
    """

    label: str
    value: str
    text: str
    mark: str = ""


@dataclass(frozen=True)
class Cards:
    """Cards side by side."""

    kind: ClassVar[str] = "cards"
    cards: Sequence[Card]


@dataclass(frozen=True)
class Notices:
    """A list of sentences.

    Attributes:
        items: mark (``bad``, ``good`` or "") and sentence.
    """

    kind: ClassVar[str] = "notices"
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class CommandLine:
    """How to get what is missing.

    Attributes:
        text: what it gives.
        command: the command line.
    """

    kind: ClassVar[str] = "command"
    text: str
    command: str


@dataclass(frozen=True)
class MarkedText:
    """A text with the place where it departs from another.

    Attributes:
        before: the same in both.
        at: the first word that differs; empty where this text ends there.
        after: what follows.
    """

    before: str
    at: str
    after: str


@dataclass(frozen=True)
class ShownExample:
    """One prompt with two answers.

    Attributes:
        title: names it.
        prompt: the question; empty if it is not known.
        references: right answers.
        full: full mode's answer.
        early: early exit's answer.
        verdict: what changed, in a sentence.
        mark: as of a ``Cell``.
    """

    title: str
    prompt: str
    references: str
    full: MarkedText
    early: MarkedText
    verdict: str
    mark: str = ""


@dataclass(frozen=True)
class Examples:
    """Examples, one below the other."""

    kind: ClassVar[str] = "examples"
    examples: Sequence[ShownExample]


Block = Paragraph | PageTable | Picture | FactList | Cards | Notices | CommandLine | Examples


@dataclass(frozen=True)
class Section:
    """A section with a heading.

    Attributes:
        id: its anchor.
        title: the heading.
        blocks: its content.
        sources: the files that its figures come from.
    """

    id: str
    title: str
    blocks: Sequence[Block]
    sources: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Page:
    """The whole page.

    Attributes:
        title: of the page.
        subtitle: what it is about.
        sections: from top to bottom.
        words: texts that the template needs, by key.
        language: code of the language.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    words: Any
    language: str
