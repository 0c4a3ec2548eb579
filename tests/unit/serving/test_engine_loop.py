"""The engine's loop: admission, its queue, slow readers, deadlines, background requests, and how it ends."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from megatron_ee.errors import ConfigError, UserError
from megatron_ee.inference.requests import Event, Request
from megatron_ee.serving.engine_loop import (
    BUFFER_STEPS,
    Draining,
    EngineDead,
    EngineFailed,
    EngineLoop,
    LoopLimits,
    QueueFull,
)
from megatron_ee.serving.submission import Submission
from megatron_ee.testing.serving import ScriptedEngine

SECONDS = 20.0
"""For what should take milliseconds, on a machine that is shared."""


def request(prompt: str = "x", tokens: int = 3, samples: int = 1) -> Request:
    return Request(prompt=prompt, max_tokens=tokens, samples=samples)


def with_loop(
    engine: ScriptedEngine,
    body: Callable[[EngineLoop], Awaitable[None]],
    limits: LoopLimits | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> EngineLoop:
    """Run ``body`` with a started loop, and stop it."""
    loop = EngineLoop(engine, limits or LoopLimits(), clock=clock)  # type: ignore[arg-type]

    async def main() -> None:
        loop.start()
        try:
            await asyncio.wait_for(body(loop), SECONDS)
        finally:
            engine.may_step.set()
            await asyncio.wait_for(loop.stop(), SECONDS)

    asyncio.run(main())
    return loop


async def events_of(submission: Submission) -> list[Event]:
    return [event async for event in submission]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def reasons(events: list[Event]) -> list[str | None]:
    return [event.completion.finish_reason for event in events if event.completion is not None]


def test_events_come_in_order_and_end_with_the_last_output() -> None:
    engine = ScriptedEngine()

    async def body(loop: EngineLoop) -> None:
        one, two = loop.submit(request(tokens=4)), loop.submit(request(tokens=2, samples=3))
        await one.admitted()
        await two.admitted()
        first, second = await asyncio.gather(events_of(one), events_of(two))
        assert [token.id for event in first for token in event.tokens] == [0, 1, 2] and reasons(first) == ["length"]
        assert reasons(second) == ["length"] * 3 and len(second) == 6
        state = loop.state()
        assert (state.num_running, state.num_waiting, state.kv_cache_usage, state.ready) == (0, 0, 0.5, True)
        assert state.num_preempted == engine.num_preempted
        assert len(one.intervals) == 2 and two.intervals == []  # an output of one event has none

    loop = with_loop(engine, body)
    assert not loop.state().ready and loop.failure is None
    assert engine.threads.isdisjoint({threading.get_ident()})


def test_a_refused_request_ends_alone() -> None:
    engine = ScriptedEngine()

    async def body(loop: EngineLoop) -> None:
        good, bad, bug, unread = (loop.submit(request(prompt)) for prompt in ("good", "bad", "bug", "bad"))
        with pytest.raises(ConfigError, match="prompt: is bad"):
            await bad.admitted()
        with pytest.raises(UserError, match="cannot be processed: a panic"):
            await bug.admitted()
        assert await events_of(bad) == await events_of(unread) == []
        assert reasons(await events_of(good)) == ["length"]
        assert reasons(await events_of(loop.submit(request()))) == ["length"]

    loop = with_loop(engine, body)
    assert not loop._open and not loop._entries and loop._num_outputs == 0


def test_a_bug_in_one_request_is_said_without_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    async def body(loop: EngineLoop) -> None:
        await events_of(loop.submit(request("bug")))

    with_loop(ScriptedEngine(), body)
    said = capsys.readouterr().err
    assert "because of a bug: BaseException (" in said and "testing/serving.py:" in said and "panic" not in said


def test_an_idle_loop_waits_and_keeps_the_other_ranks_from_timing_out() -> None:
    engine = ScriptedEngine()

    async def body(loop: EngineLoop) -> None:
        await until(lambda: engine.heartbeats >= 3)
        assert engine.looked <= 4 * (engine.heartbeats + 1)  # it does not spin
        await events_of(loop.submit(request(tokens=5)))

    with_loop(engine, body, LoopLimits(idle_heartbeat=0.05))
    slow = ScriptedEngine()

    async def wait(loop: EngineLoop) -> None:
        await asyncio.sleep(0.2)

    with_loop(slow, wait)
    assert slow.heartbeats == 0 and slow.looked <= 5


def test_refused_requests_do_not_hold_up_the_heartbeats() -> None:
    engine, seconds = ScriptedEngine(), itertools.count(step=40.0)

    async def body(loop: EngineLoop) -> None:
        for _ in range(10):
            with pytest.raises(ConfigError, match="is bad"):
                await loop.submit(request("bad")).admitted()

    with_loop(engine, body, LoopLimits(idle_heartbeat=100.0), lambda: next(seconds))
    assert engine.heartbeats == 3


def test_cancelling_ends_a_request_once() -> None:
    engine = ScriptedEngine()

    async def body(loop: EngineLoop) -> None:
        long, waiting = loop.submit(request(tokens=10**6)), [loop.submit(request(tokens=10**6)) for _ in range(3)]
        async for event in long:
            if event.tokens:
                for each in (long, *waiting):
                    each.cancel()
                    each.cancel()
                break
        for each in (long, *waiting):
            events = await events_of(each)
            assert reasons(events) == ["cancelled"] and not each.timed_out
        long.cancel()  # it has ended

    with_loop(engine, body, LoopLimits(buffer_events=10**7))
    assert not engine.open


def test_a_deadline_cancels() -> None:
    async def body(loop: EngineLoop) -> None:
        late, early = loop.submit(request(tokens=10**6), deadline=0.05), loop.submit(request(), deadline=SECONDS)
        assert reasons(await events_of(late)) == ["cancelled"] and late.timed_out
        assert reasons(await events_of(early)) == ["length"] and not early.timed_out

    with_loop(ScriptedEngine(), body, LoopLimits(buffer_events=10**7))


def test_a_full_queue_refuses_until_there_is_room() -> None:
    engine = ScriptedEngine(slots=1)

    async def body(loop: EngineLoop) -> None:
        running = loop.submit(request(tokens=10**6))
        await until(lambda: loop.state().num_running == 1)
        engine.may_step.clear()
        waiting = [loop.submit(request(samples=2)), loop.submit(request())]
        assert loop.state().num_waiting == 3
        started = time.perf_counter()
        for _ in range(10_000):
            with pytest.raises(QueueFull, match="3 outputs wait"):
                loop.submit(request())
        assert time.perf_counter() - started < 5 and len(loop._open) == 3
        running.cancel()
        engine.may_step.set()
        for each in waiting:
            await events_of(each)
        assert reasons(await events_of(loop.submit(request()))) == ["length"]

    with_loop(engine, body, LoopLimits(max_queue=3, buffer_events=10**7))


def test_a_slow_reader_ends_with_an_error_and_holds_up_nobody() -> None:
    engine = ScriptedEngine(pause=0.005)  # so that the other one can keep up

    async def body(loop: EngineLoop) -> None:
        slow = loop.submit(request(tokens=10**6, samples=2), streamed=True)
        other = loop.submit(request(tokens=50), streamed=True)
        assert reasons(await events_of(other)) == ["length"]
        await until(lambda: not engine.open)  # it was cancelled
        events = await events_of(slow)
        kept = 2 * BUFFER_STEPS
        assert [event.error is None for event in events] == [True] * kept + [False] * 2
        assert events[-1].error is not None and f"read too slowly: {kept} events wait" in events[-1].error
        assert {event.sample for event in events[-2:]} == {0, 1}

    loop = with_loop(engine, body, LoopLimits(buffer_events=4))
    assert not loop._open


def test_an_answer_that_is_not_streamed_does_not_end_because_the_server_is_late() -> None:
    async def body(loop: EngineLoop) -> None:
        late = loop.submit(request(tokens=200, samples=3))
        await until(lambda: not loop._open)  # all its events wait
        assert reasons(await events_of(late)) == ["length"] * 3

    with_loop(ScriptedEngine(), body, LoopLimits(buffer_events=4))


def test_background_requests_start_one_by_one_while_there_is_nothing_else() -> None:
    engine = ScriptedEngine(slots=8)

    async def body(loop: EngineLoop) -> None:
        engine.may_step.clear()
        audits = [loop.submit(request(f"audit {number}"), background=True) for number in range(3)]
        await audits[0].admitted()
        ordinary = [loop.submit(request(f"client {number}")) for number in range(4)]
        assert len(loop._background) == 2 and loop.state().num_waiting == 4
        engine.may_step.set()
        for each in (*ordinary, *audits):
            assert reasons(await events_of(each)) == ["length"]
        assert loop.state().num_waiting == 0 and not loop._background

    with_loop(engine, body, LoopLimits(max_queue=4))
    assert engine.order == ["audit 0", *(f"client {number}" for number in range(4)), "audit 1", "audit 2"]


def test_background_requests_that_have_not_started_end_with_the_server() -> None:
    engine = ScriptedEngine()

    async def body(loop: EngineLoop) -> None:
        running = loop.submit(request(tokens=10**6))
        audit, unwanted = (loop.submit(request("audit"), background=True) for _ in range(2))
        unwanted.cancel()
        with pytest.raises(UserError, match="cancelled before it started"):
            await unwanted.admitted()
        draining = asyncio.create_task(loop.drain(SECONDS))
        with pytest.raises(Draining):
            await audit.admitted()
        running.cancel()
        assert await draining and reasons(await events_of(running)) == ["cancelled"]

    with_loop(engine, body, LoopLimits(buffer_events=10**7))
    assert engine.order == ["x"]


def test_draining_lets_requests_end_and_takes_no_new_ones() -> None:
    async def body(loop: EngineLoop) -> None:
        running = [loop.submit(request(tokens=20)) for _ in range(5)]
        draining = asyncio.create_task(loop.drain(SECONDS))
        await asyncio.sleep(0)
        assert not loop.state().ready
        with pytest.raises(Draining, match="the server is stopping"):
            loop.submit(request())
        for each in running:
            assert reasons(await events_of(each)) == ["length"]
        assert await draining
        assert await loop.drain(0)  # nothing is left

    with_loop(ScriptedEngine(), body)


def test_draining_cancels_what_takes_too_long() -> None:
    async def body(loop: EngineLoop) -> None:
        running = [loop.submit(request(tokens=10**6)) for _ in range(3)]
        assert not await loop.drain(0.05)
        for each in running:
            assert reasons(await events_of(each)) == ["cancelled"]

    with_loop(ScriptedEngine(), body, LoopLimits(buffer_events=10**7))


def test_a_failed_step_ends_every_request_with_an_error() -> None:
    engine = ScriptedEngine()

    async def body(loop: EngineLoop) -> None:
        engine.may_step.clear()
        running = [loop.submit(request(tokens=9, samples=2)) for _ in range(3)]
        audit = loop.submit(request(), background=True)
        await running[-1].admitted()
        engine.fault = RuntimeError("device lost\nand more")
        engine.may_step.set()
        await loop.ended()
        for each in running:
            events = await events_of(each)
            assert [(event.sample, event.error) for event in events] == [
                (sample, "the engine has failed; the server's log says why") for sample in (0, 1)
            ]
        with pytest.raises(EngineDead):
            await audit.admitted()
        with pytest.raises(EngineDead):
            loop.submit(request())
        assert not loop.state().ready

    loop = with_loop(engine, body)
    failure = loop.failure
    assert isinstance(failure, EngineFailed) and failure.__cause__ is engine.fault
    assert "the engine failed: RuntimeError: device lost (testing/serving.py:" in str(failure)
    assert "\n" not in str(failure)


def test_a_lost_rank_ends_every_request_while_a_step_hangs() -> None:
    engine = ScriptedEngine()

    async def body(loop: EngineLoop) -> None:
        engine.may_step.clear()
        running = loop.submit(request())
        await running.admitted()
        watchdog = threading.Thread(target=loop.on_rank_lost, args=("rank 1 (stage 1) is gone",))
        watchdog.start()
        events = await events_of(running)
        assert [event.error is None for event in events] == [False]
        await loop.ended()
        watchdog.join()
        with pytest.raises(EngineDead):
            loop.submit(request())
        assert not loop.state().ready

    with_loop(engine, body)


def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    engine = ScriptedEngine(slots=16)

    async def body(loop: EngineLoop) -> None:
        async def client(number: int) -> None:
            for turn in range(50):
                submission = loop.submit(request(tokens=1 + number % 3, samples=1 + turn % 2), deadline=SECONDS)
                if turn % 5 == number % 5:
                    submission.cancel()
                await events_of(submission)

        await asyncio.gather(*(client(number) for number in range(20)))
        assert not loop._open and not loop._entries and loop._commands.empty()
        assert loop.state().num_waiting == loop.state().num_running == 0

    with_loop(engine, body)
    assert engine.numbers == 1000
