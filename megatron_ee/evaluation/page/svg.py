"""Figures of the page: SVG from matplotlib, whose colours and fonts are the page's own, in light and in dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_ee.errors import printable
from megatron_ee.evaluation.history import Validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand for colours of the page's style sheet, since a figure is drawn once for light and dark.
INK, GRID, PAPER = "#010101", "#020202", "#030303"
SERIES = ("#040401", "#040402", "#040403", "#040404", "#040405", "#040406")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
"""Lines differ in more than their colour."""
MARKS = ("o", "s", "^", "D", "v", "P")
SYMBOLS = {
    "o": "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0z",
    "s": "M-4.5-4.5h9v9h-9z",
    "^": "M0-5L5 5H-5z",
    "D": "M0-6L6 0L0 6L-6 0z",
    "v": "M0 5L-5-5H5z",
    "P": "M-2-5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z",
    "X": "M0-2.5L2.5-5L5-2.5L2.5 0L5 2.5L2.5 5L0 2.5L-2.5 5L-5 2.5L-2.5 0L-5-2.5L-2.5-5z",
    "--": "M-6-1h5v2h-5zM1-1h5v2h-5z",
}
"""Marks in a legend, and a dashed line: paths around 0, of at most 12 units."""
VARIABLES = {
    INK: "var(--ink)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)},
}
SIZE = (4.8, 3.2)
"""Inches. At 72 units an inch, letters of 10 units can be read on a phone."""
LABEL = 24
"""Characters of a label."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # letters stay letters, in the reader's fonts
    "svg.hashsalt": "megatron-ee",  # the same figure gives the same bytes
    "text.parse_math": False,
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


class Look(NamedTuple):
    """How a series looks, in its figure and in the legend.

    Attributes:
        series: number of its colour, from 1.
        mark: a key of ``SYMBOLS``.
    """

    series: int
    mark: str

    @property
    def colour(self) -> str:
        """As matplotlib draws it."""
        return SERIES[self.series - 1]

    @property
    def symbol(self) -> str:
        """The mark as a path."""
        return SYMBOLS[self.mark]


CURVE, CHOSEN, OTHERS = Look(1, "o"), Look(2, "D"), Look(3, "s")
PASSED, FAILED, LIMIT = Look(1, "o"), Look(2, "X"), Look(2, "--")
MEAN, WORSE = Look(1, "o"), Look(2, "D")


def exit_look(place: int) -> Look:
    """How the line of an exit looks; ``place`` counts the exits by layer, from 0."""
    return Look(place % len(SERIES) + 1, MARKS[place % len(MARKS)])


@dataclass(frozen=True)
class Interval95:
    """A figure of something with its 95% interval, and whether it stands out.

    Attributes:
        name: what it is of.
        low, mean, high: in the unit of the axis.
        chosen: whether it stands out.
    """

    name: str
    low: float
    mean: float
    high: float
    chosen: bool = False


class _Drawing:
    """A figure while it is drawn, and its markup afterwards."""

    figure: Figure
    svg: str = ""


@contextmanager
def _drawn(name: str, size: tuple[float, float] = SIZE) -> Iterator[_Drawing]:
    """Yield a drawing to draw on; ``svg`` is set when the block ends. ``name`` is unique among the page's figures."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    result = _Drawing()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The reader's browser has the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        result.figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(result.figure)
        yield result
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        result.figure.savefig(out, format="svg", metadata=nothing)
    result.svg = embedded(out.getvalue(), name)


def embedded(svg: str, name: str) -> str:
    """Markup of an SVG file for use inside HTML: without declarations, with ids of its own and the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would hold for the whole page
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    tag = svg[: svg.index(">")]
    svg = re.sub(r'\s(?:height|width)="[^"]*"', "", tag) + svg[len(tag) :]
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font-family: [^;\"]*;?\s?", "", svg)
    return svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1).strip()


def draw_trade(
    points: Sequence[tuple[str, float, Interval95]],
    curve: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    full: str,
) -> str:
    """Quality against speed: one mark with an interval per setting.

    Args:
        points: per setting its short name, its speed, and its quality in percent.
        curve: names of the settings that are joined by a line.
        x_label, y_label: of the axes.
        full: name of full mode, at whose quality a line is drawn.
    """
    with _drawn("trade") as drawing:
        axes = drawing.figure.subplots()
        base = next(quality.mean for name, _, quality in points if name == full)
        axes.axhline(base, color=INK, lw=0.8, ls=":")
        axes.axvline(1, color=INK, lw=0.8, ls=":")
        joined = [(speed, quality.mean) for name, speed, quality in points if name in curve]
        if joined:
            axes.plot(*zip(*joined, strict=True), color=CURVE.colour, lw=1.2)
        for name, speed, quality in points:
            ends = [[max(0.0, quality.mean - quality.low)], [max(0.0, quality.high - quality.mean)]]
            look, size = CHOSEN if quality.chosen else CURVE if name in curve else OTHERS, 8 if quality.chosen else 6
            style: dict[str, Any] = {"ms": size, "capsize": 3, "lw": 1.2, "zorder": 3}
            axes.errorbar(speed, quality.mean, ends, fmt=look.mark, color=look.colour, **style)
        axes.margins(x=0.16, y=0.16)
        low, high = axes.get_ylim()
        axes.set_ylim(max(0.0, low), high)  # a difference's interval may reach beyond what a share can be
        _label_points(drawing.figure, axes, [(speed, quality.mean, name) for name, speed, quality in points])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return drawing.svg


def _label_points(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its mark, in the first of some directions where it covers no other name."""
    figure.canvas.draw()  # fixes the layout, which determines positions in pixels
    taken: list[Any] = []
    for x, y, name in points:
        for dx, dy, align in ((7, 6, "left"), (7, -13, "left"), (-7, 6, "right"), (-7, -13, "right"), (7, 18, "left")):
            note = axes.annotate(
                short(name), (x, y), (dx, dy), textcoords="offset points", ha=align, fontsize=9, zorder=4
            )
            box = note.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


def draw_agreement(validations: Sequence[Validation], *, x_label: str, y_label: str) -> str:
    """Agreement of each exit with full mode, in percent, against the tokens seen; the exits in the order of layers."""
    with _drawn("agreement") as drawing:
        axes = drawing.figure.subplots()
        seen = [each.tokens_seen for each in validations]
        for number, layer in enumerate(sorted(validations[-1].agreements)):
            values = [100 * each.agreements.get(layer, float("nan")) for each in validations]
            look = exit_look(number)
            dashes = DASHES[number % len(DASHES)]
            axes.plot(seen, values, look.mark, ls=dashes, color=look.colour, ms=5, lw=1.6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", nbins=5)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.03)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return drawing.svg


def draw_intervals(name: str, rows: Sequence[Interval95], overall: float, *, x_label: str) -> str:
    """One row per group: a mean with its interval, and a line at the mean of all. ``name`` is the figure's."""
    with _drawn(name, (SIZE[0], 0.34 * len(rows) + 0.9)) as drawing:
        axes = drawing.figure.subplots()
        axes.axvline(overall, color=INK, lw=0.8, ls=":")
        for place, row in enumerate(rows):
            look = WORSE if row.chosen else MEAN
            axes.plot([row.low, row.high], [place, place], color=look.colour, lw=1.6)
            axes.plot([row.mean], [place], look.mark, color=look.colour, ms=7)
        axes.set_yticks(range(len(rows)), [short(row.name) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)
    return drawing.svg


def draw_tests(
    name: str,
    tests: Sequence[tuple[float, float, bool]],
    risk: float,
    chosen: int | None,
    *,
    x_label: str,
    y_label: str,
) -> str:
    """Mean loss of the tested settings, in percent, against the layers that they use, with the risk as a line.

    Args:
        name: of the figure.
        tests: mean exit layer, mean loss in percent and whether it passed, from safe to fast.
        risk: in percent.
        chosen: number of the test whose setting was taken; None for none.
        x_label, y_label: of the axes.
    """
    with _drawn(name, (SIZE[0], 2.6)) as drawing:
        axes = drawing.figure.subplots()
        axes.axhline(risk, color=LIMIT.colour, lw=1.2, ls=LIMIT.mark)
        axes.plot([layer for layer, _, _ in tests], [loss for _, loss, _ in tests], color=PASSED.colour, lw=1)
        for number, (layer, loss, passed) in enumerate(tests):
            style: Mapping[str, Any] = {"ms": 9 if number == chosen else 6, "zorder": 3}
            look = PASSED if passed else FAILED
            axes.plot([layer], [loss], look.mark, color=look.colour, **style)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.08, y=0.2)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return drawing.svg


def short(text: str) -> str:
    """A label of at most ``LABEL`` printable characters."""
    plain = printable(text)
    return plain if len(plain) <= LABEL else plain[: LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
