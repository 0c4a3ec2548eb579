"""Progress of long work on stderr: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINE_SECONDS = 10.0  # between two plain lines
_REDRAW_SECONDS = 0.1
_WINDOW_SECONDS = 30.0  # the rate is the mean over this much of the past


class Progress:
    """What ``track`` gives. ``done`` is the number of units finished so far."""

    def __init__(self, total: int, unit: str, description: str, rate_unit: str, done: int, bar: Any = None) -> None:
        self.total, self.unit, self.description, self.rate_unit, self.done = total, unit, description, rate_unit, done
        self._bar = bar
        self._before = done
        self._start = self._shown = time.monotonic()
        # (time, units done, amount in rate units done), oldest first
        self._history: deque[tuple[float, int, float]] = deque([(self._start, done, 0.0)])
        self._amount = 0.0
        self._task = bar.add_task("", total=total, completed=done, text="") if bar is not None else None

    def advance(self, count: int = 1, amount: float | None = None) -> None:
        """``count`` more units are done, worth ``amount`` in the rate's unit (default: ``count``)."""
        self.done += count
        self._amount += count if amount is None else amount
        now = time.monotonic()
        if now - self._shown >= (_REDRAW_SECONDS if self._bar is not None else LINE_SECONDS):
            self._remember(now)
            self._show(now)

    def describe(self, text: str) -> None:
        """Replace the description, for example by one with the latest losses; shown with the next update."""
        self.description = text

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def line(self) -> str:
        """The state in words: done of total, rate and time left."""
        then, done, amount = self._history[0]
        seconds = max(time.monotonic() - then, 1e-9)
        pace = (self.done - done) / seconds
        left = f"{_clock((self.total - self.done) / pace)} left" if pace > 0 and self.total > self.done else ""
        parts = [
            f"{_quantity(self.done, self.unit)}/{_quantity(self.total, self.unit)} {_name(self.unit)}",
            f"{_quantity((self._amount - amount) / seconds, self.rate_unit)} {_name(self.rate_unit)}/s",
            left,
        ]
        return ", ".join(part for part in parts if part)

    def _remember(self, now: float) -> None:
        self._history.append((now, self.done, self._amount))
        while len(self._history) > 2 and now - self._history[1][0] >= _WINDOW_SECONDS:
            self._history.popleft()

    def _show(self, now: float) -> None:
        self._shown = now
        if self._bar is not None:
            text = f"{self.line()}  {self.description}"
            self._bar.update(self._task, completed=self.done, text=text)
        else:
            self.note(f"{self.description}: {self.line()}")

    def _finish(self) -> None:
        if self.done > self._before:
            self._history = deque([(self._start, self._before, 0.0)])  # the last line tells the mean over all of it
            self._show(time.monotonic())


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
        total: units of work in all.
        unit: their name, such as ``"steps"``; ``"B"`` for bytes, shown as MB.
        description: what is being done.
        rate_unit: name of what ``advance``'s ``amount`` counts, such as ``"tokens"``; default: ``unit``.
        completed: units done before, by an earlier run: they count in the total, not in the rate.
        enabled: False shows nothing (processes other than the first).
    """
    rate_unit = rate_unit or unit
    if not enabled:
        yield _Silent(total, unit, description, rate_unit, completed)
        return
    if not sys.stderr.isatty():
        progress = Progress(total, unit, description, rate_unit, completed)
        yield progress
        progress._finish()
        return
    # Imported only here: most commands never draw a bar.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), TextColumn("{task.fields[text]}", markup=False), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), refresh_per_second=8) as bar:
        progress = Progress(total, unit, description, rate_unit, completed, bar)
        progress._show(time.monotonic())
        yield progress
        progress._finish()


class _Silent(Progress):
    """Counts and shows nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def _show(self, now: float) -> None:
        self._shown = now


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
