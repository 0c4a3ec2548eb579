"""Background saves: a copy in host memory, and a thread that writes it.

There is one save at a time; the next one waits for it. All ranks do each step of a save together, so all ranks know of
a failure. ``Saver.check``, ``wait`` or the next ``save`` raises its error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.checkpoint.failpoints import failpoint
from megatron_ee.checkpoint.writing import Piece, write_checkpoint
from megatron_ee.errors import CheckpointError, UserError
from megatron_ee.parallel.agreement import Gather, together
from megatron_ee.parallel.groups import Groups, gather_objects

ALIGNMENT = 64  # bytes
NOTICEABLE = 0.5  # seconds of waiting for an earlier save after which the wait is reported


@dataclass(frozen=True)
class SaveTimes:
    """Times of a finished save, in seconds.

    Attributes:
        final: the checkpoint.
        stopped: time that the caller waited: for the earlier save, for the copy, and for writing if that was not in the
            background.
        writing: time of writing.
    """

    final: Path
    stopped: float
    writing: float


@dataclass
class Saver:
    """Writes checkpoints one after another. Every rank has a saver and calls the same methods in the same order.

    As a context manager it waits for the last save, also if the context ends by an error, because that save is valid.

    Attributes:
        asynchronous: write in a thread. Otherwise ``save`` returns after writing.
        rank: of this process.
        world_size: number of processes.
        gather: as in ``write_checkpoint``, over a group that nothing else uses during a save.
        report: called when a save had to wait for the one before it.
    """

    asynchronous: bool = True
    rank: int = 0
    world_size: int = 1
    gather: Gather | None = None
    report: Callable[[str], None] = lambda line: None
    _buffer: Tensor = field(default_factory=lambda: platform.host_buffer(0), repr=False)
    _running: _Running | None = field(default=None, repr=False)
    _finished: list[SaveTimes] = field(default_factory=list, repr=False)

    def save(
        self,
        final: Path,
        pieces: Iterable[Piece],
        metadata: Mapping[str, Any],
        then: Callable[[], None] = lambda: None,
        *,
        wait: bool = False,
    ) -> None:
        """Write a checkpoint; see ``write_checkpoint``. A background save returns when the pieces are copied.

        Args:
            final: directory of the checkpoint.
            pieces: this rank's pieces.
            metadata: must not be changed during the save, because it is not copied.
            then: called on the first rank when the checkpoint is complete; from the thread in a background save.
            wait: return after writing, even if ``asynchronous``. The pieces are then not copied.

        Raises:
            CheckpointError: this save or the previous one failed.
        """
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        if waited > NOTICEABLE:
            self.report(f"{final}: waited {waited:.1f} s for the save before it; save less often, or to a faster disk")

        def write(pieces: Iterable[Piece]) -> None:
            write_checkpoint(final, pieces, metadata, rank=self.rank, world_size=self.world_size, gather=self.gather)
            together(self.gather, lambda: then() if self.rank == 0 else None)

        if wait or not self.asynchronous:
            begun = time.perf_counter()
            write(pieces)
            ended = time.perf_counter()
            self._finished.append(SaveTimes(final, ended - started, ended - begun))
            return
        copies = self._copy(list(pieces))
        self._running = _Running(final, partial(write, copies))
        self._running.start()
        self._running.stopped = time.perf_counter() - started

    def _copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copy pieces to host memory, which the next save reuses."""
        starts, end = [], 0
        for piece in pieces:
            starts.append(end)
            end += -(-piece.tensor.numel() * piece.tensor.element_size() // ALIGNMENT) * ALIGNMENT
        if end > self._buffer.numel():
            self._buffer = platform.host_buffer(0)  # frees the old one first
            self._buffer = platform.host_buffer(end)
        copies = []
        with torch.no_grad():
            for start, piece in zip(starts, pieces, strict=True):
                nbytes = piece.tensor.numel() * piece.tensor.element_size()
                copy = self._buffer[start : start + nbytes].view(piece.tensor.dtype).view(piece.tensor.shape)
                copy.copy_(piece.tensor, non_blocking=True)
                copies.append(Piece(piece.key, piece.global_shape, piece.offset, copy))
        platform.synchronize()
        return copies

    @property
    def failure(self) -> str | None:
        """The error message of the background save, if this rank knows that it failed."""
        error = self._running.error if self._running is not None else None
        return None if error is None else str(error) or type(error).__name__

    def check(self, failures: Sequence[str | None] | None = None) -> None:
        """Raise if the background save has failed. It does not wait.

        Args:
            failures: ``failure`` of every rank, so that all ranks raise together; None with one rank.

        Raises:
            CheckpointError: it failed.
        """
        for rank, failure in enumerate([self.failure] if failures is None else failures):
            if failure is not None:
                self.wait()  # raises this rank's own error, if it has one
                error = CheckpointError(f"rank {rank}: {failure}")
                error.common = True
                raise error

    def wait(self) -> None:
        """Wait until no save is running.

        Raises:
            CheckpointError: it failed.
        """
        running = self._running
        if running is None:
            return
        running.join()
        self._running = None
        if running.error is not None:
            raise running.error
        self._finished.append(SaveTimes(running.final, running.stopped, running.writing))

    def finished(self) -> list[SaveTimes]:
        """The saves that have finished successfully since the last call."""
        if self._running is not None and not self._running.is_alive() and self._running.error is None:
            self.wait()
        times, self._finished = self._finished, []
        return times

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, Exception):  # an interrupt must end at once
            try:
                self.wait()
            except UserError as failure:
                self.report(f"the save in progress failed too: {failure}")
            except Exception:  # for example after a lost rank, which the watchdog reports better
                pass


class _Running(threading.Thread):
    """The thread of a background save.

    Attributes:
        error: its error, if it failed.
        stopped: seconds that the caller waited.
        writing: seconds of writing.
    """

    def __init__(self, final: Path, work: Callable[[], None]) -> None:
        super().__init__(name="saving", daemon=True)  # the process ends without waiting for it only when interrupted
        self.final, self._work = final, work
        self.error: BaseException | None = None
        self.stopped = self.writing = 0.0

    def run(self) -> None:
        """Write, and record the result."""
        started = time.perf_counter()
        try:
            failpoint("save.thread")
            self._work()
        except BaseException as error:
            self.error = error
        self.writing = time.perf_counter() - started


def group_saver(groups: Groups, asynchronous: bool, report: Callable[[str], None] = lambda line: None) -> Saver:
    """A ``Saver`` of all ranks of a run."""
    size = groups.world.size()
    gather = partial(gather_objects, group=groups.saving) if size > 1 else None
    return Saver(asynchronous, groups.rank, size, gather, report)
