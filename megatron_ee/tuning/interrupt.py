"""SIGTERM, SIGINT and SIGUSR1: a tuning run finishes its step and saves; other commands end at once.

The commands install the handlers before any large import, so that they are in place from the start.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_ee.errors import Interrupted

if TYPE_CHECKING:  # importing it means importing torch
    from megatron_ee.parallel.groups import Groups

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SLURM can send SIGUSR1 ahead of the time limit."""
_AGAIN_SECONDS = 0.05  # seconds until a dropped signal is sent again: enough for most finalisers
Handler = Callable[[int, FrameType | None], Any]


class Signalled(KeyboardInterrupt):
    """A signal ended a command that has nothing to save. Like KeyboardInterrupt it is not caught by ``except
    Exception``.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


@dataclass
class Interrupt:
    """Whether a signal asked the run to save and end."""

    name: str | None = None

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.name is not None

    def check(self) -> None:
        """Raise ``Interrupted`` if this process has received a signal."""
        if self.name is not None:
            raise Interrupted(self.name)

    def check_together(self, groups: Groups) -> None:
        """Raise ``Interrupted`` on all ranks if any rank has received a signal. Every rank calls this."""
        if groups.world.size() == 1:
            self.check()
        else:
            groups.together(self.check)


_watching: Interrupt | None = None
"""The open watch of this process. There is one, because signals are per process."""


@contextlib.contextmanager
def watch_signals() -> Iterator[Interrupt]:
    """Record SIGTERM, SIGINT and SIGUSR1 while the context is open. A second SIGINT interrupts at once.

    Inside another ``watch_signals`` it yields the outer ``Interrupt``, with the signals received so far.
    """
    global _watching
    if _watching is not None:
        yield _watching
        return
    interrupt = _watching = Interrupt()

    def remember(number: int, frame: FrameType | None) -> None:
        if interrupt.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupt.name = interrupt.name or signal.Signals(number).name

    try:
        with _handled_by(remember):
            yield interrupt
    finally:
        _watching = None


@contextlib.contextmanager
def raise_signals() -> Iterator[None]:
    """Let the first SIGTERM, SIGINT or SIGUSR1 raise ``Signalled`` in the main thread while the context is open.

    Open contexts then clean up. Meanwhile further signals have no effect, except SIGINT, which interrupts again. Python
    drops exceptions that are raised inside a finaliser, such as ``__del__``, so such a signal is sent once more.
    """
    seen: list[int] = []
    timers: list[threading.Timer] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 1 or number == signal.SIGINT:
            raise Signalled(number)

    def send_again(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, Signalled):
            return report(dropped)
        seen.clear()
        # To the main thread, to interrupt a blocking call there.
        to_main = (threading.main_thread().ident, dropped.exc_value.number)
        timers.append(threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, to_main))
        timers[-1].daemon = True
        timers[-1].start()

    report, sys.unraisablehook = sys.unraisablehook, send_again
    try:
        with _handled_by(interrupt):
            try:
                yield
            finally:
                for timer in timers:
                    timer.cancel()
    finally:
        sys.unraisablehook = report


@contextlib.contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    """Install ``handler`` for all ``SIGNALS`` while the context is open. Only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
