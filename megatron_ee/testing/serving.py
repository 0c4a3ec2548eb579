"""What tests of the server run instead of a model, and instead of its routes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError, UserError
from megatron_ee.inference.requests import Completion, Event, FinishReason, Request, Token
from megatron_ee.serving.engine_loop import EngineLoop
from megatron_ee.serving.server import ServedApp

STEP_SECONDS = 20.0
"""Longest time for which a test holds a step."""


class ScriptedEngine:
    """One token per step for each output of the requests that run, as many requests as there are slots."""

    num_layers, vocab_size, max_positions = 4, 100, 64
    exits: tuple[ExitSpec, ...] = ()
    kv_cache_usage, num_preempted = 0.5, 3

    def __init__(self, slots: int = 2, pause: float = 0.0) -> None:
        """``pause``: seconds of a step. Steps wait while ``may_step`` is not set, and raise ``fault`` if it is."""
        self.slots, self.pause, self.may_step = slots, pause, threading.Event()
        self.may_step.set()
        self.open: dict[int, tuple[Request, list[int]]] = {}
        self.events: list[Event] = []
        self.order: list[Any] = []  # prompts as they are submitted
        self.threads: set[int] = set()
        self.heartbeats = self.looked = self.numbers = 0
        self.fault: BaseException | None = None

    def submit(self, request: Request) -> int:
        """See ``Engine``. The prompts ``bad`` and ``bug`` are refused, and fail."""
        self.threads.add(threading.get_ident())
        if request.prompt == "bad":
            raise ConfigError("prompt: is bad")
        if request.prompt == "bug":
            raise BaseException("a panic about bug")
        self.order.append(request.prompt)
        self.numbers += 1
        self.open[self.numbers] = request, [0] * request.samples
        return self.numbers

    def cancel(self, number: int) -> None:
        """See ``Engine``."""
        if number in self.open:
            _, counts = self.open.pop(number)
            self.events += [end(number, sample, count, "cancelled") for sample, count in enumerate(counts)]

    @property
    def idle(self) -> bool:
        """See ``Engine``."""
        self.looked += 1
        return not self.open and not self.events

    @property
    def num_running(self) -> int:
        """See ``Engine``."""
        return sum(len(counts) for _, counts in list(self.open.values())[: self.slots])

    def heartbeat(self) -> None:
        """See ``Engine``."""
        self.heartbeats += 1

    def step(self) -> list[Event]:
        """See ``Engine``."""
        time.sleep(self.pause)
        assert self.may_step.wait(STEP_SECONDS)
        if self.fault is not None:
            raise self.fault
        events, self.events = self.events, []
        for number, (request, counts) in list(self.open.items())[: self.slots]:
            for sample, count in enumerate(counts):
                counts[sample] += 1
                if count + 1 < request.max_tokens:
                    events.append(Event(number, sample, "x", (Token(count, 4, 0.5),)))
                else:
                    events.append(end(number, sample, count + 1, "length"))
            if counts[0] == request.max_tokens:
                del self.open[number]
        return events


def end(number: int, sample: int, count: int, reason: FinishReason) -> Event:
    """The last event of an output with ``count`` tokens."""
    tokens = tuple(Token(at, 4, 0.5) for at in range(count))
    return Event(number, sample, completion=Completion("x" * count, tokens, ("x",) * count, reason, {}))


def stream_app(engine_loop: EngineLoop, **others: Any) -> ServedApp:
    """``/ready``, and ``/stream``: the fields of a request in, a JSON line per event out."""

    async def ready(_: HTTPRequest) -> Response:
        return JSONResponse({}, 200 if engine_loop.state().ready else 503)

    async def stream(http: HTTPRequest) -> Response:
        try:
            submission = engine_loop.submit(Request(**await http.json()), streamed=True)
            await submission.admitted()
        except UserError as error:
            return JSONResponse({"error": str(error)}, 503)

        async def lines() -> AsyncIterator[str]:
            try:
                async for event in submission:
                    end = event.completion and event.completion.finish_reason
                    ids = [token.id for token in event.tokens]
                    yield json.dumps({"ids": ids, "end": end, "error": event.error}) + "\n"
            finally:
                submission.cancel()

        return StreamingResponse(lines())

    routes = [Route("/ready", ready), Route("/stream", stream, methods=["POST"])]
    return ServedApp(Starlette(routes=routes), **others)
