"""Requests in flight, as the asyncio thread sees them: events in bounded buffers, deadlines, and ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

from megatron_ee.inference.requests import Event, Request

MERGED_EVENTS = 64
"""Events of several submissions that wait to be read together, besides those in the submissions' own buffers."""


class Submission:
    """One request in flight. Only the asyncio thread uses it, except for ``cancel``. ``EngineLoop.submit`` makes it.

    Attributes:
        request: what was submitted.
        background: whether it runs only while there is no ordinary request.
        timed_out: whether its deadline ended it.
        intervals: seconds between two steps in which an output emitted tokens, of all outputs.
    """

    def __init__(
        self,
        request: Request,
        *,
        background: bool,
        buffer_events: int | None,
        on_cancel: Callable[[Submission], None],
    ) -> None:
        """Create a submission that waits for admission.

        Args:
            request: what was submitted.
            background: see above.
            buffer_events: maximum number of events that wait to be read; None for any number.
            on_cancel: called once when it is cancelled, in any thread.
        """
        self.request, self.background = request, background
        self.timed_out = False
        self.intervals: list[float] = []
        self._emitted: dict[int, float] = {}  # by output, the time of its last token
        self._loop = asyncio.get_running_loop()
        self._limit, self._on_cancel, self._cancelled = buffer_events, on_cancel, False
        self._buffer: deque[Event] = deque()
        self._open = set(range(request.samples))
        self._closed = False  # no further event is taken
        self._changed = asyncio.Event()
        self._admission: asyncio.Future[None] = self._loop.create_future()
        self._deadline: asyncio.TimerHandle | None = None

    async def admitted(self) -> None:
        """Wait until the engine has accepted the request.

        Raises:
            ConfigError: the engine refuses the request, see ``Engine.submit``.
            EngineDead: the engine has failed.
            Draining: the server is stopping, and a background request has not started.
            UserError: it was cancelled before it started, or its text cannot be processed.
        """
        await asyncio.shield(self._admission)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield the events of all outputs as they come, for one reader.

        Every output ends with a completion or an error. After a buffer overflow, and if the engine fails, that is an
        error for each output that has not ended. Nothing is yielded for a request that was refused.
        """
        while True:
            while self._buffer:
                yield self._buffer.popleft()
            if self._closed:
                return
            await self._changed.wait()
            self._changed.clear()

    def cancel(self) -> None:
        """End the request. Its outputs end with ``finish_reason`` ``cancelled`` and the tokens so far. Thread safe."""
        if not self._cancelled:
            self._cancelled = True
            self._on_cancel(self)

    # ------------------------------------------------------------------------------------ called by the engine's loop

    def expire_after(self, seconds: float) -> None:
        """Cancel it ``seconds`` from now, unless it has ended by then."""
        self._deadline = self._loop.call_later(seconds, self._expire)

    def admit(self, error: Exception | None = None) -> None:
        """Note that the engine has accepted the request, or refused it with ``error``."""
        if self._admission.done():
            return
        if error is None:
            self._admission.set_result(None)
            return
        self._admission.set_exception(error)
        self._admission.exception()  # nobody may be waiting for it, which is no mistake
        self._close()

    def push(self, event: Event, at: float) -> None:
        """Add an event of the engine. It is dropped if the submission has been closed.

        Args:
            event: to add.
            at: end of its step, in seconds of any clock.
        """
        if self._closed:
            return
        if event.tokens:
            if event.sample in self._emitted:
                self.intervals.append(at - self._emitted[event.sample])
            self._emitted[event.sample] = at
        if self._limit is not None and len(self._buffer) >= self._limit:
            self.fail(f"the answer was read too slowly: {self._limit} events wait; read them as they come")
            self.cancel()
            return
        self._buffer.append(event)
        if event.last:
            self._open.discard(event.sample)
        if not self._open:
            self._close()
        self._changed.set()

    def fail(self, message: str) -> None:
        """End every output that has not ended with an error."""
        if self._closed:
            return
        self._buffer.extend(Event(0, sample, error=message) for sample in sorted(self._open))
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._changed.set()
        if self._deadline is not None:
            self._deadline.cancel()

    def _expire(self) -> None:
        self.timed_out = True
        self.cancel()


async def merged(
    submissions: Sequence[Submission], note: Callable[[int, Event], None] = lambda index, event: None
) -> AsyncGenerator[tuple[int, Event]]:
    """The events of several submissions as they come, with the submission's index.

    Args:
        submissions: to read; nothing else reads them meanwhile.
        note: called with each event when it is read, which may be before it is yielded.
    """
    if len(submissions) == 1:
        async for event in submissions[0]:
            note(0, event)
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue(MERGED_EVENTS)

    async def read(index: int, submission: Submission) -> None:
        async for event in submission:
            note(index, event)
            await queue.put((index, event))
        await queue.put((index, None))

    readers = [asyncio.create_task(read(index, submission)) for index, submission in enumerate(submissions)]
    try:
        left = len(readers)
        while left:
            index, given = await queue.get()
            if given is None:
                left -= 1
            else:
                yield index, given
    finally:
        for reader in readers:
            reader.cancel()
