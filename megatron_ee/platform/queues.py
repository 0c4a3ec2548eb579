"""Work that a device queues: how it is measured, done beside other work, and given data from host memory.

A CPU does all work at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from megatron_ee.platform.accelerator import has_accelerator, queues_work, synchronize
from megatron_ee.platform.memory import host_buffer


def mark() -> Any:
    """The current point of the current stream; the current time without an accelerator."""
    if not has_accelerator():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, second: Any) -> float:
    """Time from one mark to a later one of the same stream; waits until the device has reached the later one."""
    if isinstance(second, float):
        return float(second - first)
    second.synchronize()
    return float(first.elapsed_time(second)) / 1000


class DeviceTimer:
    """Measures the device work that is queued between its creation and ``stop``. The host waits only in ``seconds``.

    It measures only work of the current stream, not waits for other processes.
    """

    def __init__(self) -> None:
        self._start = self._end = mark()

    def stop(self) -> None:
        """End of the measured work."""
        self._end = mark()

    def seconds(self) -> float:
        """Duration of the work; waits until the work is done."""
        return seconds_between(self._start, self._end)


class Clock:
    """Converts marks of any stream to seconds of ``time.perf_counter``."""

    def __init__(self) -> None:
        self._origin = mark()
        synchronize()
        self._time = time.perf_counter()

    def time(self, of: Any) -> float:
        """When the device reached a mark; waits until it has."""
        return of if isinstance(of, float) else self._time + seconds_between(self._origin, of)


class DeviceQueue:
    """A queue of device work that this thread adds to, beside its other device work. On a CPU work is done at once."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if has_accelerator() else None

    @contextlib.contextmanager
    def after_this(self) -> Iterator[None]:
        """Add what is queued while the context is open. It begins after all that the caller has queued so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def reads(self, tensor: torch.Tensor) -> None:
        """Keep memory of ``tensor`` that is freed from being reused before the work added so far has ended."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def join(self) -> None:
        """Let what the caller queues from now on begin after all work here has ended."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def finish(self) -> None:
        """Wait until all work here has ended."""
        if self._stream is not None:
            self._stream.synchronize()


class SideStream:
    """Does work in order on a thread of its own, beside the computation. On a GPU it has a stream of its own too."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "side stream")
        self._stream = torch.cuda.Stream() if has_accelerator() else None

    def start(self, work: Callable[[], None], memory: torch.Tensor) -> SideWork:
        """Start work that writes to ``memory``. Its device work begins after all that the caller has queued so far."""
        stream = self._stream
        if stream is None:
            return SideWork(self._thread.submit(work))
        before, done = torch.cuda.Event(), torch.cuda.Event()
        before.record()
        memory.record_stream(stream)  # otherwise memory that is freed might be reused before the work has ended

        def run() -> None:
            with torch.cuda.stream(stream):
                stream.wait_event(before)
                work()
                done.record()

        return SideWork(self._thread.submit(run), done)


class SideWork:
    """Work that ``SideStream.start`` has started."""

    def __init__(self, queued: Future[None], done: Any = None) -> None:
        self._queued, self._done = queued, done

    def wait(self) -> None:
        """Let what the caller queues from now on begin after this work has ended. Raises what the work raised."""
        self._queued.result()
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)


class Staging:
    """A page-locked buffer on the way from files to a device's memory. A CPU needs none.

    Attributes:
        copies: whether there is a buffer, from which ``send`` copies.
    """

    def __init__(self, like: torch.Tensor, instead: str) -> None:
        """``like``: device memory of the largest size. ``instead``: see ``host_buffer``."""
        self._bytes = host_buffer(like.nbytes, instead) if queues_work(like.device) else None
        self.copies = self._bytes is not None
        self._sent: Any = None

    def room(self, memory: torch.Tensor) -> torch.Tensor:
        """Host memory to write what ``memory`` is to have, of its shape ``[elements]`` and dtype. Waits until the last
        ``send`` has read it."""
        if self._bytes is None:
            return memory
        if self._sent is not None:
            self._sent.synchronize()
        return self._bytes[: memory.nbytes].view(memory.dtype)

    def send(self, memory: torch.Tensor) -> None:
        """Copy what was written into ``room`` to ``memory``, on the current stream."""
        if self._bytes is not None:
            memory.copy_(self._bytes[: memory.nbytes].view(memory.dtype), non_blocking=True)
            self._sent = torch.cuda.Event()
            self._sent.record()
