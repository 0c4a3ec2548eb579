"""Finds the newest undamaged checkpoint to continue from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_ee.checkpoint.atomic import (
    mark_damaged,
    numbered_directories,
)
from megatron_ee.checkpoint.store import Checkpoint, open_checkpoint
from megatron_ee.errors import CheckpointError, DamagedError
from megatron_ee.parallel.agreement import Gather, together

T = TypeVar("T")


def newest_readable(parent: str | os.PathLike[str], *, verify: bool = True) -> Checkpoint | None:
    """Open the newest ``step-N`` of ``parent`` with undamaged manifest and headers; None if there is none.

    This is for reading its metadata. ``load_latest`` may still find damaged tensors and use an earlier one.

    Raises:
        CheckpointError: a checkpoint cannot be read for a reason other than damage.
    """
    for _, path in reversed(numbered_directories(parent)):
        with contextlib.suppress(DamagedError):
            return open_checkpoint(path, verify=verify)
    return None


def load_latest(
    parent: str | os.PathLike[str],
    load: Callable[[Checkpoint], T],
    report: Callable[[str], None],
    *,
    rank: int = 0,
    gather: Gather | None = None,
    verify: bool = True,
) -> T | None:
    """Load the newest undamaged ``step-N`` of ``parent``.

    A damaged checkpoint is renamed to ``step-N.damaged-*`` and reported, and the one before it is tried. Any other
    error (a checkpoint of another model, no permission) is raised and changes nothing on disk.

    Args:
        parent: directory of the checkpoints.
        load: reads the checkpoint. With several ranks it must not communicate, because it may fail on one of them.
        report: called with one line for each damaged checkpoint.
        rank: of this process.
        gather: as in ``write_checkpoint``; all ranks then use the same checkpoint.
        verify: verify checksums. Without them, only a damaged manifest or header is detected.

    Returns:
        The result of ``load``; None if there is no checkpoint.

    Raises:
        CheckpointError: all checkpoints are damaged. Errors of ``load`` other than damage are passed on.
    """
    names = together(gather, lambda: [str(path) for _, path in numbered_directories(parent)] if rank == 0 else [])[0]
    for path in map(Path, reversed(names)):
        loaded: list[T] = []

        def attempt(path: Path = path, loaded: list[T] = loaded) -> str | None:
            try:
                loaded.append(load(open_checkpoint(path, verify=verify)))
            except DamagedError as error:
                return str(error)
            return None

        problems = [problem for problem in together(gather, attempt) if problem is not None]
        if not problems:
            return loaded[0]
        moved = together(gather, lambda path=path: str(mark_damaged(path)) if rank == 0 else None)[0]  # type: ignore[misc]
        report(f"DAMAGED CHECKPOINT: {problems[0]}; moved to {moved}, falling back to the one before")
    if names:
        raise CheckpointError(f"{parent}: every checkpoint in it is damaged; start without resuming, in a new output")
    return None
