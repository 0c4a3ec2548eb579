"""Whatever arrives, is cancelled and ends while others run: outputs are those of each request alone, nothing leaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import megatron_ee.inference.kv_cache as kv_cache
import megatron_ee.inference.scheduler as scheduler_module
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.inference import kv_cache_manager, loading
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Draft, Event, Request
from megatron_ee.inference.sampling import Sampling

DRAWN = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=3)
SOUND = (1, 2)
REQUESTS = [
    Request(prompt=[5, 17, 99], max_tokens=14),
    Request(prompt=list(range(30, 50)), max_tokens=9, sampling=DRAWN),
    Request(
        prompt=[9], mode="threshold", policy=ThresholdPolicy(threshold=0.08, max_deferred=3), exits=SOUND, max_tokens=17
    ),
    Request(
        prompt=[9, 8, 7, 6, 5],
        mode="threshold",
        policy=ThresholdPolicy(threshold=0.03, thresholds={1: 0.2}, measure="margin", backoff=1),
        exits=SOUND,
        max_tokens=12,
    ),
    Request(
        prompt=[3] * 11,
        mode="threshold",
        policy=ThresholdPolicy(threshold=0.05, backoff=2),
        exits=(2,),
        sampling=DRAWN,
        samples=2,
        max_tokens=10,
    ),
    Request(prompt=[5, 17, 99, 42], mode="speculative", draft=Draft(exit=2, length=3), max_tokens=16),
    Request(prompt=[64, 3, 2], mode="speculative", draft=Draft(exit=1, length=2), sampling=DRAWN, max_tokens=13),
    Request(prompt=[7, 7, 8], mode="speculative", exits=SOUND, max_tokens=15),  # adaptive
    Request(prompt=[11, 12] * 6, sampling=DRAWN, samples=3, max_tokens=8, logprobs=1),
    Request(
        prompt=[1, 2], mode="threshold", policy=ThresholdPolicy(threshold=0.4), exits=(1, 2, 3), max_tokens=9
    ),  # comes to the spoilt exit
    Request(
        prompt=[40],
        mode="threshold",
        policy=ThresholdPolicy(threshold=0.1),
        exits=SOUND,
        forced_ids=list(range(60, 72)),
    ),
    Request(prompt=[41], replay_ids=list(range(60, 90)), logprobs=1, exits=SOUND),
]
ADAPTIVE, SPOILT = 7, 9
Summary = list[Any]


@pytest.fixture(scope="module")
def stage(exit_stage: Callable[[str, Sequence[ExitSpec]], Stage]) -> Stage:
    """With windows; its third exit gives no numbers."""
    stage = exit_stage("qwen2-window", [ExitSpec(1, "layer"), ExitSpec(2), ExitSpec(3, "embedding")])
    with torch.no_grad():
        stage.exits[2].head.matrix.weight[50] = float("nan")
    return stage


def summary(event: Event) -> Any:
    """How an output ended."""
    if event.completion is None:
        return event.error
    tokens = [(token.id, token.layer) for token in event.completion.tokens]
    return tokens, event.completion.finish_reason


@pytest.fixture(scope="module")
def alone(stage: Stage) -> list[Summary]:
    """By request and sample."""
    found = []
    for request in REQUESTS:
        engine = make_engine(stage)
        number = engine.submit(request)
        ends = [e for e in engine.stream(number) if e.completion is not None or e.error is not None]
        found.append([summary(end) for end in sorted(ends, key=lambda end: end.sample)])
    return found


@pytest.fixture(scope="module")
def small(alone: list[Summary]) -> Iterator[None]:
    """Chunks and passes so small that sequences grow through many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "CHUNK", 4)
        patch.setattr(kv_cache_manager, "CHUNK", 4)
        patch.setattr(loading, "SLACK", 17)  # enough for drafts and for policies that defer 15 tokens
        patch.setattr(scheduler_module, "PASS_TOKENS", 7)
        patch.setattr(kv_cache_manager, "MIN_PREFIX", 2)
        yield


class Run:
    """An engine under observation."""

    def __init__(self, stage: Stage, max_num_seqs: int, room: int, spare: int, kept: int = 0) -> None:
        budget = self._scheduler(make_engine(stage)).kv_caches.budget
        self.engine = make_engine(
            stage,
            EngineOptions(
                max_num_seqs=max_num_seqs,
                kv_memory=room * budget.needed(32, 32) + budget.needed(spare, spare),
                prefix_cache_seqs=kept,
            ),
        )
        self.scheduler = self._scheduler(self.engine)
        self.asked: dict[int, int] = {}
        self.cancelled: set[int] = set()
        self.emitted: dict[tuple[int, int], list[Any]] = {}
        self.ends: dict[tuple[int, int], Event] = {}

    @staticmethod
    def _scheduler(engine: Engine) -> Any:
        return engine._scheduler

    def submit(self, index: int) -> None:
        self.asked[self.engine.submit(REQUESTS[index])] = index

    def cancel(self, which: int) -> None:
        """One that may have ended."""
        if self.asked:
            number = list(self.asked)[which % len(self.asked)]
            self.cancelled.add(number)
            self.engine.cancel(number)

    def step(self, count: int) -> None:
        for _ in range(count):
            for event in self.engine.step():
                key = event.request, event.sample
                assert key not in self.ends, "an event after its end"
                self.emitted.setdefault(key, []).extend((t.id, t.layer) for t in event.tokens)
                if event.completion is not None or event.error is not None:
                    self.ends[key] = event
            scheduler = self.scheduler
            budget, prefixes = scheduler.kv_caches.budget, scheduler.kv_caches.prefixes
            assert budget.used <= budget.total and len(scheduler.running) <= scheduler.max_num_seqs
            assert len(prefixes.seq_ids) <= prefixes.max_num_seqs
            held = {*scheduler.running, *prefixes.seq_ids}
            assert set(scheduler.stages[0].sequences) == held == set(budget._claims)

    def finish(self, alone: list[Summary]) -> None:
        """Run out, and compare."""
        for _ in range(5000):
            if self.engine.idle:
                break
            self.step(1)
        assert self.engine.idle, "it runs in circles"
        scheduler = self.scheduler
        assert not scheduler.running and not scheduler.waiting and not self.engine._outputs
        caches = scheduler.kv_caches
        assert caches.prefixes.max_num_seqs or (caches.budget.used == 0 and not scheduler.stages[0].sequences)
        assert set(self.ends) == {(n, i) for n, index in self.asked.items() for i in range(REQUESTS[index].samples)}
        for (number, sample), end in self.ends.items():
            index = self.asked[number]
            ours, theirs = summary(end), alone[index][sample]
            if index == ADAPTIVE:  # time decides who drafts, not what is emitted
                ours, theirs = (([token for token, _ in tokens], how) for tokens, how in (ours, theirs))
            if end.completion is not None:
                assert self.emitted[number, sample] == summary(end)[0]
            if end.completion is not None and end.completion.finish_reason == "cancelled":
                assert number in self.cancelled
                emitted = theirs[0] if index != SPOILT else None
                assert emitted is None or ours[0] == emitted[: len(ours[0])]
            else:
                assert ours == theirs


ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, len(REQUESTS) - 1)),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
)
EVERYTHING = [("submit", index) for index in range(len(REQUESTS))]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    actions=st.lists(ACTIONS, min_size=4, max_size=24),
    max_num_seqs=st.integers(1, 6),
    room=st.integers(1, 3),
    spare=st.integers(0, 20),
    kept=st.sampled_from([0, 1, 3]),
)
@example(actions=EVERYTHING, max_num_seqs=20, room=1, spare=0, kept=0)
@example(actions=EVERYTHING[::-1], max_num_seqs=4, room=2, spare=8, kept=0)
@example(actions=[*EVERYTHING, ("step", 400), *EVERYTHING[::-1]], max_num_seqs=6, room=3, spare=8, kept=3)
@example(
    actions=[*EVERYTHING, ("step", 40), *[("cancel", n) for n in range(11)]], max_num_seqs=5, room=2, spare=0, kept=2
)
@example(
    actions=[("submit", 4), ("step", 3), ("submit", 4), ("step", 9), ("submit", 8)],
    max_num_seqs=3,
    room=1,
    spare=9,
    kept=0,
)
def test_any_schedule(
    actions: list[tuple[str, int]],
    max_num_seqs: int,
    room: int,
    spare: int,
    kept: int,
    stage: Stage,
    alone: list[Summary],
    small: None,
) -> None:
    run = Run(stage, max_num_seqs, room, spare, kept)
    for name, argument in actions:
        getattr(run, name)(argument)
    run.finish(alone)


def test_the_schedules_are_hard(stage: Stage, alone: list[Summary], small: None) -> None:
    """What the property is about happens: sequences are preempted, one fails, tokens leave everywhere."""
    run = Run(stage, 20, 1, 8)
    for name, argument in EVERYTHING:
        getattr(run, name)(argument)
    run.finish(alone)
    assert run.scheduler.num_preempted > 3
    assert alone[SPOILT][0].startswith("the logits after layer 3 at position ")
    layers = {layer for ends in alone for end in ends if not isinstance(end, str) for _, layer in end[0]}
    assert layers == {1, 2, 4}
