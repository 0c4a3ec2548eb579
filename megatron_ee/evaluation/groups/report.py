"""How early exit treats groups of records: a table, a plot, a warning, and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.errors import printable
from megatron_ee.evaluation.figure import COLOURS, GREY, saved_figure
from megatron_ee.evaluation.groups.compare import (
    LAYERS,
    LEAST_MEMBERS,
    LOSS,
    SIGNIFICANCE,
    GroupComparison,
    GroupFigure,
    GroupOutcome,
)
from megatron_ee.evaluation.statistics import LEVEL
from megatron_ee.tables import add_columns, make_console, new_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

    from megatron_ee.tables import Table


def groups_dict(found: GroupComparison) -> dict[str, Any]:
    """The comparison for ``--json``."""
    return {
        "by": found.by,
        "risk": found.risk,
        "overall": dict(found.overall),
        "certified": None if found.certified is None else dict(zip(("risk", "delta"), found.certified, strict=True)),
        "groups": [
            {
                "name": group.name,
                "members": group.members,
                "too_small": group.too_small,
                "largest_loss": group.largest_loss,
                **{measure: dataclasses.asdict(figure) for measure, figure in group.figures.items()},
            }
            for group in found.groups
        ],
        "warning": warning(found),
    }


def warning(found: GroupComparison) -> str | None:
    """One line about the groups that carry more risk than the others; None if there are none."""
    if not found.riskier:
        return None
    named = "; ".join(_against_rest(group, group.figures[found.risk], found.risk) for group in found.riskier)
    return f"more risk than in the other groups by {found.by}: {named}"


def _against_rest(group: GroupOutcome, figure: GroupFigure, measure: str) -> str:
    assert figure.rest is not None and figure.p is not None  # without them no group is called worse
    mean, rest = _number(figure.mean, measure), _number(figure.rest, measure)
    return f"{printable(group.name)} ({measure} {mean}, others {rest}, p = {figure.p:.2g})"


def print_groups(compared: Mapping[str, GroupComparison]) -> None:
    """Print a table of each setting to stdout, the groups that are too small, and the warnings.

    Args:
        compared: comparisons of the same groups, by the setting's name.
    """
    console = make_console()
    first = next(iter(compared.values()))
    for name, found in compared.items():
        if found.large_enough:
            console.print(_table(f"Groups by {found.by}, {name}", found, console))
            console.print()
    small = [f"{printable(group.name)} ({group.members})" for group in first.groups if group.too_small]
    if not first.large_enough:
        console.print(
            f"Groups by {first.by}: none has {LEAST_MEMBERS} records or more, so none is compared: {', '.join(small)}",
            soft_wrap=True,
        )
        return
    console.print(
        f"Means with {LEVEL:.0%} intervals. * differs from all other records (p at most {SIGNIFICANCE:g} after "
        "Holm's correction), ! differs and is worse.",
        soft_wrap=True,
    )
    if first.certified is not None:
        risk, delta = first.certified
        console.print(
            f"Loss at most: the expected loss of each group, for all groups together with probability {1 - delta:.4g}. "
            f"The certificate's risk is {risk:.1%} over all requests.",
            soft_wrap=True,
        )
    if small:
        line = f"Too small to be judged, fewer than {LEAST_MEMBERS} records: {', '.join(small)}"
        console.print(line, soft_wrap=True)
    for name, found in compared.items():
        if found.riskier:
            console.print(f"warning: {name}: {warning(found)}", soft_wrap=True)


def _table(title: str, found: GroupComparison, console: Console) -> Table:
    measures = list(found.overall)
    table = new_table(title, console)
    add_columns(table, "group", words=True)
    certified = () if found.certified is None else ("loss at most",)
    add_columns(table, "records", *measures, f"p, {found.risk}", *certified)
    for group in found.large_enough:
        cells = [_cell(group.figures.get(measure), measure) for measure in measures]
        risk = group.figures.get(found.risk)
        p = "-" if risk is None or risk.p is None else f"{risk.p:.4f}"
        bound = "-" if group.largest_loss is None else f"{group.largest_loss:.1%}"
        table.add_row(group.name, f"{group.members:,}", *cells, p, *(bound for _ in certified))
    return table


def plot_groups(compared: Mapping[str, GroupComparison], path: Path) -> None:
    """Plot each measure of each group with its interval, beside the mean of all records: one row per setting.

    Args:
        compared: as for ``print_groups``.
        path: the file.

    Raises:
        UserError: ``path`` is not a .png, .pdf or .svg, or cannot be written.
        ValueError: all groups are too small.
    """
    first = next(iter(compared.values()))
    measures, count = list(first.overall), len(first.large_enough)
    if not count:
        raise ValueError("all groups are too small to be plotted")
    size = (2.6 * len(measures) + 1.6, (0.3 * count + 1.1) * len(compared) + 0.8)
    with saved_figure(path, size) as figure:
        grid = figure.subplots(len(compared), len(measures), sharex="col", sharey=True, squeeze=False)
        for row, (name, found) in zip(grid, compared.items(), strict=True):
            for axes, measure in zip(row, measures, strict=True):
                _plot_measure(axes, found, measure)
            row[0].set_title(name, loc="left")
        for axes, measure in zip(grid[-1], measures, strict=True):
            axes.set_xlabel(measure if measure == LAYERS else f"{measure} (%)")
        grid[0, 0].set_yticks(range(count), [f"{group.name} ({group.members})" for group in first.large_enough])
        grid[0, 0].set_ylim(count - 0.5, -0.5)
        legend = "dotted: mean of all records; diamond: worse than the others"
        if first.certified is not None:
            legend += "; dashed: the certified risk"
        if count < len(first.groups):
            legend += f"; groups too small to be shown: {len(first.groups) - count}"
        title = f"Groups by {first.by}: mean and {LEVEL:.0%} interval\n{legend}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)


def _plot_measure(axes: Axes, found: GroupComparison, measure: str) -> None:
    axes.axvline(_scaled(found.overall[measure], measure), color=GREY, lw=1, ls=":")
    if measure == LOSS and found.certified is not None:
        axes.axvline(_scaled(found.certified[0], measure), color=COLOURS[3], lw=1.2, ls="--")
    for place, group in enumerate(found.large_enough):
        figure = group.figures.get(measure)
        if figure is not None:
            low, mean, high = (_scaled(value, measure) for value in (figure.low, figure.mean, figure.high))
            colour = COLOURS[1] if figure.worse else COLOURS[0]
            axes.plot([low, high], [place, place], color=colour, lw=1.6)
            axes.plot([mean], [place], "D" if figure.worse else "o", color=colour, ms=6)


def _cell(figure: GroupFigure | None, measure: str) -> str:
    if figure is None:
        return "too small"
    values = (_number(value, measure) for value in (figure.mean, figure.low, figure.high))
    mark = "!" if figure.worse else "*" if figure.p is not None and figure.p <= SIGNIFICANCE else " "
    return "{} [{}, {}]{}".format(*values, mark)


def _number(value: float, measure: str) -> str:
    return f"{value:.1f}" if measure == LAYERS else f"{value:.1%}"


def _scaled(value: float, measure: str) -> float:
    return value if measure == LAYERS else 100 * value
