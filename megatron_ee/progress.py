"""Progress of long work on stderr: rich's bar on a terminal, occasional plain lines elsewhere.

rich computes rate and time left in both cases.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

LINE_SECONDS = 10.0  # seconds between two plain lines
_RATE_SECONDS = 600.0  # the rate is the mean over this time, or over the last 1000 updates


class _Figures(ProgressColumn):
    """``done/total unit, rate``, as in a plain line."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        return Text(_figures(task), style="progress.data.speed")


class Progress:
    """The object that ``track`` yields."""

    def __init__(
        self, total: int, unit: str, description: str, rate_unit: str, completed: int, *, enabled: bool = True
    ) -> None:
        self._enabled = enabled
        self._lines = enabled and not sys.stderr.isatty()
        self._bars = Bars(
            BarColumn(),
            TaskProgressColumn(),
            _Figures(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            refresh_per_second=8,
            speed_estimate_period=_RATE_SECONDS,
            disable=not enabled or self._lines,
        )
        counted: dict[str, Any] = {"before": completed, "unit": unit, "amount": 0.0, "rate_unit": rate_unit}
        self._id = self._bars.add_task(description, total=total, completed=completed, **counted)
        self._task = self._bars.tasks[0]
        self._bars.advance(self._id, 0)  # rates are measured from here
        self._shown = time.monotonic()

    @property
    def done(self) -> int:
        """Units finished so far."""
        return int(self._task.completed)

    def advance(self, count: int = 1, amount: float | None = None) -> None:
        """Record ``count`` more finished units, and ``amount`` in the rate's unit (default: ``count``)."""
        self._task.fields["amount"] += count if amount is None else amount
        self._bars.advance(self._id, count)
        now = time.monotonic()
        if self._lines and not self._task.finished and now - self._shown >= LINE_SECONDS:  # ``track`` gives the last
            self._shown = now
            self.note(self._line())

    def describe(self, text: str) -> None:
        """Replace the description, for example by one with the latest losses. It is shown with the next update."""
        self._task.description = text

    def note(self, text: str) -> None:
        """Print a separate line, above the bar if there is one."""
        if self._lines:
            print(text, file=sys.stderr, flush=True)
        elif self._enabled:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self) -> str:
        left = self._task.time_remaining
        return f"{self._task.description}: {_figures(self._task)}" + (f", {_clock(left)} left" if left else "")


@contextmanager
def track(
    total: int,
    unit: str,
    description: str,
    rate_unit: str | None = None,
    *,
    completed: int = 0,
    enabled: bool = True,
) -> Iterator[Progress]:
    """Show progress while the block runs.

    Args:
        total: total units of work.
        unit: their name, such as ``"steps"``; ``"B"`` for bytes, shown as MB.
        description: what is being done.
        rate_unit: unit of ``amount`` in ``advance``, such as ``"tokens"``; default: ``unit``.
        completed: units that an earlier run finished. They count in the total, not in the rate.
        enabled: False shows nothing, for all processes but the first.
    """
    progress = Progress(total, unit, description, rate_unit or unit, completed, enabled=enabled)
    with progress._bars:
        yield progress
    if progress._lines and progress.done > completed:
        progress._task.finished_time = progress._task.elapsed  # the last line gives the mean over the whole work
        progress.note(progress._line())


def _figures(task: Task) -> str:
    """Text such as ``4/10 steps, 5,000 tokens/s``: the recent rate, or the mean of the whole work at its end."""
    fields, done = task.fields, task.completed - task.fields["before"]
    mean = done / max(task.elapsed or 0, 1e-9)
    units = task.speed if task.speed and not task.finished else mean
    amount = units * fields["amount"] / done if done else 0.0
    unit, rate_unit = fields["unit"], fields["rate_unit"]
    counted = f"{_quantity(task.completed, unit)}/{_quantity(task.total or 0, unit)} {_name(unit)}"
    return f"{counted}, {_quantity(amount, rate_unit)} {_name(rate_unit)}/s"


def _name(unit: str) -> str:
    return "MB" if unit == "B" else unit


def _quantity(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 1e6:,.1f}"
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.2f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
