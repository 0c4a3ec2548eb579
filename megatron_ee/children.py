"""Rules for a process that this package started: it follows its parent."""

from __future__ import annotations

import os
import signal
import threading
from typing import Protocol


class Parent(Protocol):
    """The parent of a child process, as ``multiprocessing.parent_process()`` gives it."""

    def join(self) -> None:
        """Wait until it ends."""


def follow(parent: Parent | None) -> None:
    """In a child: ignore Ctrl-C, which reaches the whole process group, and end when the parent ends.

    The child also ends in the middle of its work, and if the parent was killed. Otherwise it would wait for ever or
    keep working.
    """
    assert parent is not None, "this process is nobody's child"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Parent) -> None:
    parent.join()
    os._exit(1)
