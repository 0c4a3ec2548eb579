"""Results of tasks as tables and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.evaluation.figure import COLOURS, GREY, saved_figure
from megatron_ee.evaluation.tasks.answers import BATCHES_PER_BLOCK
from megatron_ee.evaluation.tasks.results import AGREEMENT_SCORES, BASELINE, QUALITY, SettingResult, TaskResults
from megatron_ee.tables import add_columns, counted, make_console, new_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

    from megatron_ee.tables import Table

NAMES = {
    "contains": "contains",
    "exact_match": "exact match",
    "f1": "F1",
    "rouge_l": "ROUGE-L",
    "accuracy": "right choice",
    "accuracy_per_character": "right per character",
    "equal_answers": "equal answers",
    "tokens_before_departure": "tokens before departure",
    "equal_tokens": "equal tokens",
}
"""Names of scores in tables and plots."""
NONE = "-"
"""Cell of a table without a figure."""
SHOWN_AGREEMENT = ("equal_answers", "equal_tokens")
"""Scores of agreement in tables."""
MARKS = {BASELINE: "s", "speculative": "D"}
"""Marks of settings in plots; threshold mode has dots."""
ASIDE = 4  # points between the marks of two scores of one setting
TITLE_PAD = 62  # points, with room for the labels of settings
LABEL_WIDTH = 0.03
"""Share of the width of the axes that the label of a setting takes."""
LINES = {"threshold": "-", "gate": "--"}
"""Lines that join the thresholds of a policy."""


def print_tasks(results: TaskResults, batch: int, console: Console | None = None) -> None:
    """Print a table of all records and, of several tasks, one table per task; then how the speed was measured.

    Args:
        results: to print.
        batch: maximum number of running sequences.
        console: print to this console, not to stdout.
    """
    console = console or make_console()
    records, tasks = results.overall[0].rows, len(results.tasks)
    of = f"{counted(records, 'record')} of {tasks} tasks" if tasks > 1 else counted(records, "record")
    console.print(_table(f"Quality beside speed ({of})", results.overall, console))
    if tasks > 1:
        for task, found in results.tasks.items():
            console.print()
            console.print(_table(f"{task} ({counted(found[0].rows, 'record')})", found, console))
    console.print()
    for line in _notes(results, batch):
        console.print(line, soft_wrap=True)


def _table(title: str, found: Sequence[SettingResult], console: Console) -> Table:
    """One row per setting. Below a mean of a setting that is not full mode stands the interval of its difference.

    Columns without any figure are left out.
    """
    compared = len(found) > 1
    columns: dict[str, Callable[[SettingResult], str]] = {
        "tokens/s": lambda each: NONE if each.speed is None else f"{each.speed.tokens_per_second:.1f}"
    }
    if compared:
        columns["speed"] = lambda each: NONE if each.speed is None else f"{each.speed.speedup:.2f}x"
        columns["exit layer"] = lambda each: _number(each.exit_layer)
    columns["layers per token"] = lambda each: _number(each.layers_per_token)
    for score in (*QUALITY, *(SHOWN_AGREEMENT if compared else ())):
        if score in found[0].scores:
            columns[NAMES[score]] = partial(_score, score=score)
    if compared:
        columns["first departure"] = lambda each: _number(each.mean_departure)
    cells = {name: [cell(each) for each in found] for name, cell in columns.items()}
    filled = {name: column for name, column in cells.items() if set(column) != {NONE}}
    table = new_table(title, console)
    add_columns(table, "setting", words=True)
    add_columns(table, *filled)
    for each, *row in zip(found, *filled.values(), strict=True):
        table.add_row(each.setting, *row)
    return table


def _score(result: SettingResult, *, score: str) -> str:
    own = result.scores[score]
    interval = f"\n{_points(own.low)} to {_points(own.high)}"
    return f"{own.mean:.1%}" + (interval if result.setting != BASELINE else "")


def _points(difference: float) -> str:
    """Percentage points, with a decimal below 10."""
    points = 100 * difference
    return f"{points:+.1f}" if abs(points) < 9.95 else f"{points:+.0f}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _notes(results: TaskResults, batch: int) -> list[str]:
    notes = []
    if len(results.settings) > 1:
        notes.append("Second lines: 95% interval of the difference to full mode, in percentage points.")
    if any(each.mean_departure is not None for each in results.overall):
        notes.append("First departure: mean position of the first token that is not full mode's, where there is one.")
    timed = [each.speed for each in results.overall if each.speed is not None]
    answered = sum(row.answer is not None for row in results.rows[BASELINE])
    if timed:
        notes.append(
            f"Speed: {timed[0].rows} of {answered} answered records, prompts included, at most {batch} sequences at a "
            f"time; blocks of at most {batch * BATCHES_PER_BLOCK} records, each in every setting in rotating order, "
            "after a warm-up."
        )
    elif answered:
        notes.append("Speed: not measured, since no block of records ran without interruption.")
    cut = results.overall[0].cut
    if cut:
        notes.append(f"{cut:.1%} of full mode's answers were cut at {results.settings[0].max_tokens} tokens.")
    return notes


def plot_tasks(results: TaskResults, path: str | Path) -> None:
    """Plot quality against speed, and agreement with full mode against the layer of the exit.

    Lines join the thresholds. Bars are the 95% intervals of the difference to full mode.

    Raises:
        UserError: ``path`` is not a .png, .pdf or .svg, or cannot be written.
    """
    found = results.overall
    with saved_figure(path, (11, 4.8)) as figure:
        left, right = figure.subplots(1, 2)
        speeds = {each.setting: None if each.speed is None else each.speed.speedup for each in found}
        timed = any(speed is not None for speed in speeds.values())
        _plot_scores(left, found, QUALITY, speeds if timed else {name: float(n) for n, name in enumerate(speeds)})
        left.set_xlabel("speed (full mode = 1)" if timed else "settings (speed was not measured)")
        left.set_ylabel("mean over the records (%)")
        left.set_title("Quality", loc="left", pad=TITLE_PAD)
        _plot_scores(right, found, AGREEMENT_SCORES, {each.setting: each.exit_layer for each in found})
        right.set_xlabel("layer of the exit that emits a token (mean)")
        right.set_title("Agreement with full mode", loc="left", pad=TITLE_PAD)
        for axes in (left, right):
            axes.set_ylim(0, 105)
            handles, _ = axes.get_legend_handles_labels()
            if handles:
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _plot_scores(
    axes: Axes, found: Sequence[SettingResult], scores: Sequence[str], places: dict[str, float | None]
) -> None:
    """A mark per setting and score, with the thresholds of a policy joined by a line."""
    from matplotlib.transforms import ScaledTranslation

    placed = [(each, place) for each in found if (place := places[each.setting]) is not None]
    shown = [score for score in scores if score in found[0].scores] if placed else []
    for number, (colour, score) in enumerate(zip(COLOURS, shown, strict=False)):
        aside = (number - (len(shown) - 1) / 2) * ASIDE / 72  # inches, so that intervals stand side by side
        assert axes.figure is not None
        style: dict[str, Any] = {
            "color": colour,
            "transform": axes.transData + ScaledTranslation(aside, 0, axes.figure.dpi_scale_trans),
        }
        for each, place in placed:
            mean = each.scores[score]
            down, up = mean.difference - mean.low, mean.high - mean.difference
            mark = MARKS.get(each.setting, "o")
            face = "white" if each.setting in MARKS else colour
            ends = [[100 * max(0.0, down)], [100 * max(0.0, up)]]
            axes.errorbar(place, 100 * mean.mean, ends, fmt=mark, mfc=face, ms=5, capsize=2, lw=1, **style)
        axes.plot([], [], color=colour, label=NAMES[score])
        for policy, line in LINES.items():
            curve = [
                (place, 100 * each.scores[score].mean) for each, place in placed if each.setting.startswith(policy)
            ]
            if curve:
                axes.plot(*zip(*curve, strict=True), line, lw=1.4, **style)
    if placed:  # moved marks are not counted in the limits
        low, high = min(place for _, place in placed), max(place for _, place in placed)
        margin = 0.12 * (high - low) or 0.1 * high or 0.1
        axes.set_xlim(low - margin, high + margin)
    labels = [(place, each.setting.removeprefix("threshold ")) for each, place in placed if shown]
    _label_places(axes, labels)


def _label_places(axes: Axes, labels: Sequence[tuple[float, str]]) -> None:
    """Write settings above the axes, upright, and those that are close to each other as one text."""
    low, high = axes.get_xlim()
    groups: list[list[tuple[float, str]]] = []
    for place, text in sorted(labels):
        if groups and place - groups[-1][0][0] < LABEL_WIDTH * (high - low):
            groups[-1].append((place, text))
        else:
            groups.append([(place, text)])
    for group in groups:
        axes.annotate(
            ", ".join(text for _, text in group),
            (group[0][0], 1.0),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8,
            color=GREY,
        )
