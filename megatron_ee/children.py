"""What a process that another one has started owes it."""

from __future__ import annotations

import os
import signal
import threading
from typing import Protocol


class Parent(Protocol):
    """What ``multiprocessing.parent_process()`` gives a child."""

    def join(self) -> None:
        """Wait for its end."""


def follow(parent: Parent | None) -> None:
    """In a child: leave Ctrl-C, which reaches the whole group, to the parent, and end with it.

    Also in the middle of its work, and where the parent was killed: a child would else wait forever, or work on.
    """
    assert parent is not None, "this process is nobody's child"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Parent) -> None:
    parent.join()
    os._exit(1)
