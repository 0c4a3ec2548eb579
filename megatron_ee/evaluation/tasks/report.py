"""Results of tasks as tables and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ee.evaluation.plots import COLOURS, GREY, saved_figure
from megatron_ee.evaluation.tasks.answers import BATCHES_PER_BLOCK
from megatron_ee.evaluation.tasks.results import AGREEMENT, BASELINE, QUALITY, MeanScore, SettingResult, TaskResults
from megatron_ee.tables import add_columns, make_console, new_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

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
MARKS = {BASELINE: "s", "speculative": "D"}
"""Marks of settings in plots; threshold mode has dots."""
LINES = {"threshold": "-", "gate": "--"}
"""Lines that join the thresholds of a policy."""


def print_tasks(results: TaskResults, batch: int, console: Console | None = None) -> None:
    """Print a table of all rows and, of several tasks, one table per task; then how the speed was measured.

    Args:
        results: to print.
        batch: maximum number of running sequences.
        console: print to this console, not to stdout.
    """
    console = console or make_console()
    rows, tasks = results.overall[0].rows, len(results.tasks)
    of = f"{_rows(rows)} of {tasks} tasks" if tasks > 1 else _rows(rows)
    console.print(_table(f"Quality beside speed ({of})", results.overall, console))
    if tasks > 1:
        for task, found in results.tasks.items():
            console.print()
            console.print(_table(f"{task} ({_rows(found[0].rows)})", found, console))
    console.print()
    for line in _notes(results, batch):
        console.print(line, soft_wrap=True)


def _table(title: str, found: Sequence[SettingResult], console: Console) -> Table:
    """One row per setting. Below a mean of a setting that is not full mode stands the interval of its difference."""
    table = new_table(title, console)
    table.add_column("setting", no_wrap=True)
    add_columns(table, "tokens/s", "speed", "layers per token")
    scores = [score for score in (*QUALITY, "equal_answers", "equal_tokens") if score in found[0].scores]
    add_columns(table, *(NAMES[score] for score in scores), "first departure")
    for each in found:
        speed = each.speed
        table.add_row(
            each.setting,
            "-" if speed is None else f"{speed.tokens_per_second:.1f}",
            "-" if speed is None else f"{speed.speedup:.2f}x",
            _number(each.layers_per_token),
            *(_score(each.scores[score], compared=each.setting != BASELINE) for score in scores),
            _number(each.mean_departure),
        )
    return table


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _score(score: MeanScore, *, compared: bool) -> str:
    mean = f"{score.mean:.1%}"
    return f"{mean}\n{100 * score.low:+.1f}..{100 * score.high:+.1f}" if compared else mean


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _notes(results: TaskResults, batch: int) -> list[str]:
    notes = []
    if len(results.settings) > 1:
        notes.append("Second lines: 95% interval of the difference to full mode, in percentage points.")
        notes.append("First departure: mean place of the first token that is not full mode's, where there is one.")
    timed = [each.speed for each in results.overall if each.speed is not None]
    answered = sum(row.answer is not None for row in results.rows[BASELINE])
    if timed:
        notes.append(
            f"Speed: {timed[0].rows} of {answered} answered rows, prompts included, at most {batch} sequences at a "
            f"time; blocks of at most {batch * BATCHES_PER_BLOCK} rows, each in every setting in turn, after a warm-up."
        )
    elif answered:
        notes.append("Speed: not measured, since no block of rows ran in one piece.")
    cut = results.overall[0].cut
    if cut:
        notes.append(f"{cut:.1%} of full mode's answers were cut at {results.settings[0].max_tokens} tokens.")
    return notes


def plot_tasks(results: TaskResults, path: str | Path) -> None:
    """Plot quality against speed, and agreement with full mode against layers per token.

    Lines join the thresholds. Bars are the 95% intervals of the difference to full mode.

    Raises:
        UserError: ``path`` is not a .png, .pdf or .svg, or cannot be written.
    """
    found = results.overall
    with saved_figure(path, (11, 4.8)) as figure:
        left, right = figure.subplots(1, 2)
        speeds = {each.setting: None if each.speed is None else each.speed.speedup for each in found}
        _plot_scores(left, found, QUALITY, speeds)
        left.set_xlabel("speed (full mode = 1)")
        left.set_ylabel("mean over the rows (%)")
        left.set_title("Quality", loc="left")
        _plot_scores(right, found, AGREEMENT, {each.setting: each.layers_per_token for each in found})
        right.set_xlabel("layers run per token")
        right.set_title("Agreement with full mode", loc="left")
        for axes in (left, right):
            axes.set_ylim(0, 105)
            axes.margins(x=0.12)
            handles, _ = axes.get_legend_handles_labels()
            if handles:
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _plot_scores(
    axes: Axes, found: Sequence[SettingResult], scores: Sequence[str], places: dict[str, float | None]
) -> None:
    """A mark per setting and score, with the thresholds of a policy joined by a line."""
    placed = [(each, place) for each in found if (place := places[each.setting]) is not None]
    shown = [score for score in scores if score in found[0].scores] if placed else []
    for colour, score in zip(COLOURS, shown, strict=False):
        for each, place in placed:
            mean = each.scores[score]
            down, up = mean.difference - mean.low, mean.high - mean.difference
            mark = MARKS.get(each.setting, "o")
            face = "white" if each.setting in MARKS else colour
            ends = [[100 * max(0.0, down)], [100 * max(0.0, up)]]
            axes.errorbar(place, 100 * mean.mean, ends, fmt=mark, color=colour, mfc=face, ms=5, capsize=2, lw=1)
        axes.plot([], [], color=colour, label=NAMES[score])
        for policy, line in LINES.items():
            curve = [
                (place, 100 * each.scores[score].mean) for each, place in placed if each.setting.startswith(policy)
            ]
            if curve:
                axes.plot(*zip(*curve, strict=True), line, color=colour, lw=1.4)
    for each, place in placed if shown else []:
        axes.annotate(
            each.setting.removeprefix("threshold "),
            (place, 0),
            (0, 4),
            textcoords="offset points",
            ha="center",
            rotation=90,
            fontsize=8,
            color=GREY,
        )
