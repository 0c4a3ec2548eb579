"""Many clients at once on a real engine, some of which leave, read slowly or cancel: every other answer is as alone."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Completion, Draft, Event, Request
from megatron_ee.inference.sampling import Sampling
from megatron_ee.serving import engine_loop as loop_module
from megatron_ee.serving.engine_loop import EngineLoop, LoopLimits, QueueFull
from megatron_ee.serving.submission import Submission

SPECS = [ExitSpec(1), ExitSpec(2, "layer", "shared"), ExitSpec(3, "norm")]
BUFFER = 12
"""Events that wait for a reader; an answer with more overflows the buffer of one who does not read."""
GROWTH = 24e6
"""Bytes by which memory may grow after the first part: Python's and torch's caches."""


def requests(count: int) -> list[Request]:
    """Of every mode, greedy and drawn, short and long, with one output and several."""
    source, found = random.Random(5), []
    for number in range(count):
        greedy = number % 3 > 0
        fields: dict[str, Any] = {
            "prompt": [source.randrange(3, 131) for _ in range(source.randint(1, 40))],
            "max_tokens": source.choice([1, 5, 20, 60]),
            "samples": source.choice([1, 1, 1, 3]),
            "sampling": Sampling() if greedy else Sampling(temperature=0.8, top_k=30, seed=number),
            "stop_ids": (source.randrange(131),),
        }
        mode = number % 4
        if mode == 1:
            fields |= {"mode": "threshold", "policy": ThresholdPolicy(threshold=source.choice([0.02, 0.05, 0.3]))}
        elif mode == 2:
            fields |= {"mode": "speculative", "draft": Draft(exit=source.choice([1, 2, 3]), length=3)}
        found.append(Request(**fields))
    return found


def ids(completion: Completion) -> list[int]:
    return [token.id for token in completion.tokens]


class Clients:
    """Clients that repeat requests, and compare each answer with the one that the request has alone."""

    def __init__(self, engine_loop: EngineLoop, pool: list[Request], alone: list[list[Completion]]) -> None:
        self.engine_loop, self.pool, self.alone = engine_loop, pool, alone
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, seed: int, until: float) -> None:
        source = random.Random(seed)
        while time.monotonic() < until:
            index = source.randrange(len(self.pool))
            how = source.choice(["read"] * 5 + ["cancel", "leave", "deaf", "deadline"])
            try:
                submission = self.engine_loop.submit(
                    self.pool[index], deadline=0.05 if how == "deadline" else None, streamed=True
                )
            except QueueFull:
                self.ends["refused"] += 1
                await asyncio.sleep(0.05)
                continue
            await submission.admitted()
            await self.read(submission, index, how, source)

    async def read(self, submission: Submission, index: int, how: str, source: random.Random) -> None:
        events: list[Event] = []
        if how == "leave":  # the server cancels the request of a client that is gone, and reads no further
            async for event in submission:
                events.append(event)
                if source.random() < 0.3:
                    break
            submission.cancel()
            self.ends["left"] += 1
            return
        if how == "deaf":
            await asyncio.sleep(1.0)
        async for event in submission:
            events.append(event)
            if how == "cancel" and source.random() < 0.2:
                submission.cancel()
        self.check(index, events, submission)

    def check(self, index: int, events: list[Event], submission: Submission) -> None:
        """Every output has ended once, and is the one alone, or its start if it was cut short."""
        for sample, truth in enumerate(self.alone[index]):
            own = [event for event in events if event.sample == sample]
            streamed = [token.id for event in own for token in event.tokens]
            last = own[-1]
            if last.error is not None:
                reason, whole = "error", "read too slowly" in last.error and streamed == ids(truth)[: len(streamed)]
            else:
                assert last.completion is not None
                reason = last.completion.finish_reason
                expected = ids(truth)[: len(streamed)] if reason == "cancelled" else ids(truth)
                whole = streamed == ids(last.completion) == expected
                whole = whole and (reason == "cancelled" or reason == truth.finish_reason)
            self.ends[reason] += 1
            ended = [event for event in own if event.last]
            if not whole or len(ended) != 1:
                self.wrong.append(f"request {index}, sample {sample}, {reason}: {streamed} is not {ids(truth)}")


async def soak(engine: Engine, pool: list[Request], alone: list[list[Completion]], count: int, seconds: float) -> Any:
    """Run ``count`` clients. Returns them, and resident bytes after a third of the time and at the end."""
    engine_loop = EngineLoop(engine, LoopLimits(max_queue=count // 2, buffer_events=BUFFER))
    engine_loop.start()
    clients, sizes, started = Clients(engine_loop, pool, alone), [], time.monotonic()

    def measure() -> None:
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)

    asyncio.get_running_loop().call_later(seconds / 3, measure)
    try:
        await asyncio.gather(*(clients.run(seed, started + seconds) for seed in range(count)))
        assert await engine_loop.drain(30)
        measure()
        assert not engine_loop._open and not engine_loop._entries and engine_loop.state().num_waiting == 0
        assert engine.num_running == 0 and engine.kv_cache_usage == 0
    finally:
        await engine_loop.stop()
    assert engine_loop.failure is None
    return clients, sizes


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "BUFFER_STEPS", 1)


def run_soak(stage: Stage, count: int, seconds: float, size: int) -> tuple[Clients, list[int]]:
    engine, pool = make_engine(stage, EngineOptions(kv_memory=10**8)), requests(size)
    alone = [engine.generate([request])[0] for request in pool]
    clients, sizes = asyncio.run(soak(engine, pool, alone, count, seconds))
    assert not clients.wrong, "\n".join(clients.wrong[:10])
    return clients, sizes


def test_answers_are_those_of_each_request_alone(
    saved_model: Callable[..., Any], load_stage: Callable[..., Stage]
) -> None:
    clients, _ = run_soak(load_stage(saved_model("llama3.1")[0], SPECS), 8, 1.5, 12)
    assert clients.ends["length"] + clients.ends["stop"] + clients.ends["eos"] >= 5, clients.ends


@pytest.mark.slow
def test_two_minutes_of_64_clients(saved_model: Callable[..., Any], load_stage: Callable[..., Stage]) -> None:
    clients, (early, late) = run_soak(load_stage(saved_model("llama3.1")[0], SPECS), 64, 120, 60)
    print(dict(clients.ends), early, late)
    for end in ("length", "stop", "cancelled", "left", "error", "refused"):
        assert clients.ends[end] > 20, (end, clients.ends)
    assert late - early < GROWTH, (early, late)
