"""Being told to stop: SIGTERM, SIGINT and SIGUSR1 let the step in work finish."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what SLURM sends ahead of the time limit."""


@dataclass
class Interrupt:
    """Whether a signal asked the run to save and end."""

    name: str | None = None

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.name is not None


@contextlib.contextmanager
def watch_signals() -> Iterator[Interrupt]:
    """Catch SIGTERM, SIGINT and SIGUSR1 while the context is open; a second SIGINT interrupts at once."""
    interrupt = Interrupt()

    def remember(number: int, frame: FrameType | None) -> None:
        if interrupt.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupt.name = signal.Signals(number).name

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
