"""The engine's loop: a thread that owns the ``Engine``, fed by a queue from the asyncio thread.

The asyncio thread submits and cancels through a queue. The engine's thread takes these commands between two steps, runs
a step, and hands all its events over in one call. Who reads them, and how fast, does not concern it. While there is
nothing to do it waits for a command. Now and then it then sends a heartbeat to the other ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import UserError, first_line
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.requests import Event, Request
from megatron_ee.serving.console import say
from megatron_ee.serving.submission import Submission

COMMAND_SECONDS = 0.02
"""Seconds between two steps for queued commands, so that many long prompts do not stop the running outputs."""
BUFFER_STEPS = 64
"""Steps whose events may wait to be read in any case: a busy server, not the client, may be late for a few of them."""
LAST_STEP_SECONDS = 30.0
"""Seconds that cancelled requests may take to end, which is one step of the engine."""
TELL_SECONDS = 2.0
"""Seconds that the watchdog waits for the open requests to hear of a lost rank, before it ends the process."""
DEAD = "the engine has failed; the server's log says why"
STOPPED = "the server is stopping"


class QueueFull(UserError):
    """Too many requests wait; try again later."""


class Draining(UserError):
    """The server is stopping and takes no new requests."""


class EngineDead(UserError):
    """The engine has failed. Its requests have ended with an error, and there will be no others."""


class EngineFailed(RuntimeError):
    """The engine's thread has ended with an exception, which is the cause, or a rank is lost. The message is one line.

    It is not a ``UserError``: the ranks are out of step, and must not wait for each other as after a bad request.
    """


@dataclass(frozen=True)
class LoopLimits:
    """Limits of the loop.

    Attributes:
        max_queue: outputs that may wait for others to end before further requests are refused.
        buffer_events: events of a streamed request that may wait to be read, and at least ``BUFFER_STEPS`` of each
            output.
        idle_heartbeat: seconds between heartbeats to the other ranks while the engine is idle.
    """

    max_queue: int = 256
    buffer_events: int = 1024
    idle_heartbeat: float = 5.0


@dataclass(frozen=True)
class LoopState:
    """What the engine does now.

    Attributes:
        num_running: running outputs (sequences).
        num_waiting: outputs of ordinary requests that wait.
        kv_cache_usage: see ``Engine``.
        ready: whether requests are accepted.
        num_preempted: preemptions so far.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    ready: bool
    num_preempted: int = 0


@dataclass
class _Entry:
    """A request in the engine. ``left``: its outputs that have not ended."""

    submission: Submission
    left: int


Command = tuple[Literal["submit", "cancel", "drop background", "stop"], Submission | None]


class EngineLoop:
    """Runs an engine in its own thread, the only one that touches it.

    The public methods are for the asyncio thread, except ``on_rank_lost``.

    Attributes:
        exits: the exits that requests may use.
        num_layers: number of backbone layers.
        vocab_size: size of the vocabulary.
        max_positions: maximum number of positions of a sequence.
        failure: what ended it, if the engine failed or a rank is lost. There will be no further steps.
        rank_lost: whether a rank is lost. The watchdog then ends the process, as the engine's thread may wait for ever.
    """

    def __init__(
        self, engine: Engine, limits: LoopLimits = LoopLimits(), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Create a loop that has not started.

        Args:
            engine: without requests. Nothing else may use it until ``stop`` has returned.
            limits: see there.
            clock: seconds.
        """
        self._engine, self._limits, self._clock = engine, limits, clock
        self.exits: tuple[ExitSpec, ...] = engine.exits
        self.num_layers, self.vocab_size, self.max_positions = (
            engine.num_layers,
            engine.vocab_size,
            engine.max_positions,
        )
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        # Written by the asyncio thread.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._open: dict[Submission, int] = {}  # outputs that have not ended
        self._num_outputs = 0
        self._draining = False
        # Written by the engine's thread.
        self._entries: dict[int, _Entry] = {}  # by the engine's number
        self._background: deque[Submission] = deque()
        self._num_background = 0  # outputs in the engine
        self._load = (0, 0.0, 0)  # running sequences, KV usage, preemptions
        # Written by the engine's thread, or by the watchdog's.
        self.failure: EngineFailed | None = None
        self.rank_lost = False

    def start(self) -> None:
        """Start the thread. Called once, in the asyncio thread."""
        self._loop = asyncio.get_running_loop()
        self._idle, self._ended, self._told = asyncio.Event(), asyncio.Event(), threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=platform.for_other_thread(self._run), name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: Request,
        *,
        deadline: float | None = None,
        background: bool = False,
        streamed: bool = False,
        more: bool = False,
    ) -> Submission:
        """Queue a request.

        Args:
            request: what to generate.
            deadline: seconds from now after which it is cancelled; None for no limit.
            background: start it only while no ordinary request waits or runs. Such requests are never refused for
                their number, and start one by one, in their order.
            streamed: whether a client reads the events, which ends the request if it is too slow. Otherwise they are
                read here, and all of them may wait.
            more: whether it is a further prompt of an HTTP request whose first one was accepted. It is not refused for
                the outputs that wait, which may be those of the request itself.

        Raises:
            QueueFull: too many outputs wait.
            Draining: the server is stopping.
            EngineDead: the engine has failed.
        """
        if self.failed:
            raise EngineDead(DEAD)
        if self._draining or self._thread is None:
            raise Draining(STOPPED)
        if not background and not more and self._num_waiting() >= self._limits.max_queue:
            raise QueueFull(f"{self._num_waiting()} outputs wait, as many as may; try again later")
        submission = Submission(
            request,
            background=background,
            buffer_events=max(self._limits.buffer_events, BUFFER_STEPS * request.samples) if streamed else None,
            on_cancel=lambda each: self._commands.put(("cancel", each)),
        )
        self._open[submission] = request.samples
        self._num_outputs += 0 if background else request.samples
        self._idle.clear()
        if deadline is not None:
            submission.expire_after(deadline)
        self._commands.put(("submit", submission))
        return submission

    def state(self) -> LoopState:
        """What the engine does now. Cheap."""
        ready = self._thread is not None and not self._draining and not self.failed
        running, usage, preempted = self._load
        return LoopState(running, self._num_waiting(), usage, ready, preempted)

    @property
    def failed(self) -> bool:
        """Whether it has a ``failure``."""
        return self.failure is not None

    async def ended(self) -> None:
        """Wait until the engine's thread has ended, or a rank is lost. All open requests have then ended."""
        await self._ended.wait()

    async def drain(self, seconds: float) -> bool:
        """Take no new requests, and wait for those there are.

        Background requests that have not started end with an error. What still runs after ``seconds`` is cancelled.

        Returns:
            Whether every other request ended by itself.
        """
        self._draining = True
        self._commands.put(("drop background", None))
        if await self._all_ended(seconds):
            return True
        for submission in list(self._open):
            submission.cancel()
        if not await self._all_ended(LAST_STEP_SECONDS):  # the step does not end, but the process will
            self._end_all(Draining(STOPPED))
        return False

    async def stop(self) -> None:
        """Cancel all requests, and end the thread."""
        if self._thread is None:
            return
        await self.drain(0)
        self._commands.put(("stop", None))
        await asyncio.to_thread(self._thread.join)

    def on_rank_lost(self, line: str) -> None:
        """End all open requests with an error, because a rank is lost. Called by the watchdog, in its thread.

        It returns when they have been told, so that the process may end soon after.
        """
        if self._loop is None:
            return
        self.rank_lost = True  # first: the engine's thread may raise now
        self.failure = EngineFailed(line)
        self._post(self._fail)
        self._told.wait(TELL_SECONDS)

    # -------------------------------------------------------------------------------------------- the asyncio thread

    async def _all_ended(self, seconds: float) -> bool:
        """Wait until no request is open, at most ``seconds``; whether that is so."""
        if not self._idle.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)
        return self._idle.is_set()

    def _num_waiting(self) -> int:
        return max(0, self._num_outputs - max(0, self._load[0] - self._num_background))

    def _admit(self, submission: Submission, error: UserError | None) -> None:
        submission.admit(error)
        if error is not None:
            self._end(submission, submission.request.samples)

    def _deliver(self, batch: Sequence[tuple[Submission, Event]], at: float) -> None:
        for submission, event in batch:
            submission.push(event, at)
            if event.last:
                self._end(submission, 1)

    def _end(self, submission: Submission, outputs: int) -> None:
        """Count outputs that have ended."""
        if submission not in self._open:  # all were ended at once
            return
        self._open[submission] -= outputs
        self._num_outputs -= 0 if submission.background else outputs
        if not self._open[submission]:
            del self._open[submission]
        if not self._open:
            self._idle.set()

    def _end_all(self, error: UserError) -> None:
        for submission, left in list(self._open.items()):
            submission.admit(error)
            submission.fail(str(error))
            self._end(submission, left)

    def _fail(self) -> None:
        self._end_all(EngineDead(DEAD))
        self._told.set()
        self._ended.set()

    # ------------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._publish(self._engine.step())
        except BaseException as error:  # the asyncio thread raises it
            if not self.rank_lost:  # which would be the cause of this
                self.failure = EngineFailed(f"the engine failed: {_described(error)}")
                self.failure.__cause__ = error
        self._post(self._fail)

    def _take_commands(self) -> bool:
        """Apply the queued commands, waiting for one while the engine is idle. Returns False when it should stop."""
        started: float | None = None
        last_heartbeat = self._clock()
        while True:
            self._start_background()
            try:
                if self._engine.idle:
                    kind, submission = self._commands.get(timeout=self._limits.idle_heartbeat)
                else:
                    kind, submission = self._commands.get_nowait()
            except queue.Empty:
                if not self._engine.idle:
                    return True
                self._engine.heartbeat()
                last_heartbeat = self._clock()
                continue
            if kind == "stop":
                return False
            self._apply(kind, submission)
            now = self._clock()
            started = now if started is None else started
            # Many refused requests keep the queue from being empty while the engine is idle.
            if now - last_heartbeat >= self._limits.idle_heartbeat and self._engine.idle:
                self._engine.heartbeat()
                last_heartbeat = now
            if now - started > COMMAND_SECONDS and not self._engine.idle:
                return True

    def _apply(self, kind: str, submission: Submission | None) -> None:
        if submission is None:  # drop background
            while self._background:
                self._post(self._admit, self._background.popleft(), Draining(STOPPED))
        elif kind == "cancel":
            self._cancel(submission)
        elif submission.background:
            self._background.append(submission)
        else:
            self._submit(submission)

    def _submit(self, submission: Submission) -> None:
        error: UserError | None = None
        try:
            number = self._engine.submit(submission.request)
        except UserError as refused:
            error = refused
        except BaseException as bug:  # tokenizers raise BaseException; the text of the error may be the prompt's
            say(f"a request was refused because of a bug: {_described(bug, text=False)}")
            error = UserError(f"the request cannot be processed: {first_line(bug)}")
        else:
            self._entries[number] = _Entry(submission, submission.request.samples)
            self._num_background += submission.request.samples if submission.background else 0
        self._post(self._admit, submission, error)

    def _start_background(self) -> None:
        """Start the next background request if there is no other request, in the engine or in the queue."""
        if self._background and not self._entries and self._commands.empty():
            self._submit(self._background.popleft())

    def _cancel(self, submission: Submission) -> None:
        number = next((number for number, entry in self._entries.items() if entry.submission is submission), None)
        if number is not None:
            self._engine.cancel(number)
        elif submission in self._background:
            self._background.remove(submission)
            self._post(self._admit, submission, UserError("the request was cancelled before it started"))

    def _publish(self, events: Sequence[Event]) -> None:
        """Hand the events of a step to the asyncio thread, in one call."""
        batch = []
        for event in events:
            entry = self._entries[event.request]
            batch.append((entry.submission, event))
            if event.last:
                entry.left -= 1
                self._num_background -= entry.submission.background
                if not entry.left:
                    del self._entries[event.request]
        self._load = (self._engine.num_running, self._engine.kv_cache_usage, self._engine.num_preempted)
        if batch:
            self._post(self._deliver, batch, time.perf_counter())

    def _post(self, call: Callable[..., None], *arguments: object) -> None:
        """Call something in the asyncio thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the asyncio loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(call, *arguments)


def _described(error: BaseException, *, text: bool = True) -> str:
    """One line about an exception: its type, its text, and where in the code it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{f': {first_line(error)}' if text else ''}{where}"
