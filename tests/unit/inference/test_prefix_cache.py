"""Prefix reuse: which finished sequences are kept, what is copied from them, and that it changes no output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import megatron_ee.inference.kv_cache as kv_cache
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.inference import kv_cache_manager, loading
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.kv_cache_manager import MIN_PREFIX, Prefix, PrefixCache
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.passes import Pass, ScheduledSequence
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Completion, Draft, Request
from megatron_ee.inference.stage_runner import StageRunner

MakeStage = Callable[[str, Sequence[ExitSpec]], Stage]

LAYERS = 4
LONG = list(range(20, 60))
MODES: list[dict[str, Any]] = [
    {},
    {"mode": "threshold", "policy": ThresholdPolicy(threshold=0.06)},
    {"mode": "speculative", "draft": Draft(exit=1, length=3)},
]


def tokens(count: int, other: int = 0) -> tuple[int, ...]:
    return (*range(count - other), *range(1000, 1000 + other))


# -- which sequences


def test_nothing_is_kept_unless_asked_for() -> None:
    prefixes = PrefixCache()
    assert prefixes.keep(Prefix(1, tokens(100))) == [1]
    assert prefixes.longest(tokens(100), [Prefix(2, tokens(100))]) is None


def test_the_longest_common_prefix_is_found() -> None:
    prefixes = PrefixCache(4)
    assert prefixes.keep(Prefix(1, tokens(60, 30))) == [] and prefixes.keep(Prefix(2, tokens(60, 20))) == []
    assert prefixes.longest(tokens(50), []) == Prefix(2, tokens(40))
    assert prefixes.longest(tokens(50), [Prefix(7, tokens(45))]) == Prefix(7, tokens(45))
    # The last token has to run: what it is followed by is asked.
    assert prefixes.longest(tokens(40), []) == Prefix(2, tokens(39))
    assert prefixes.longest((5, *tokens(50)), []) is None
    assert prefixes.longest(tokens(MIN_PREFIX), []) is None
    shortest = prefixes.longest(tokens(MIN_PREFIX + 1), [])
    assert shortest is not None and shortest.token_ids == tokens(MIN_PREFIX)


def test_short_sequences_are_not_kept_for_reuse() -> None:
    prefixes = PrefixCache(4)
    assert (
        prefixes.keep(Prefix(1, tokens(MIN_PREFIX - 1))) == [1] and prefixes.keep(Prefix(2, tokens(MIN_PREFIX))) == []
    )


def test_the_least_recently_used_sequence_is_evicted() -> None:
    prefixes = PrefixCache(2)
    for row in (1, 2):
        assert prefixes.keep(Prefix(row, tokens(40, row))) == []
    assert prefixes.longest(tokens(40, 1), []) == Prefix(1, tokens(40, 1)[:-1])  # of use
    assert prefixes.keep(Prefix(3, tokens(40, 3))) == [2] and prefixes.seq_ids == [1, 3]
    assert prefixes.evict() == 1 and prefixes.seq_ids == [3]


def test_a_sequence_is_not_kept_beside_one_that_continues_it() -> None:
    prefixes = PrefixCache(4)
    assert prefixes.keep(Prefix(1, tokens(30))) == []
    assert prefixes.keep(Prefix(2, tokens(40))) == [1]  # the next message of a chat
    assert prefixes.keep(Prefix(3, tokens(35))) == [3]
    assert prefixes.keep(Prefix(4, tokens(40, 1))) == [] and prefixes.seq_ids == [2, 4]


def test_windows_leave_only_the_end_to_go_on_from() -> None:
    prefixes = PrefixCache(4, window=32)
    assert prefixes.keep(Prefix(1, tokens(50))) == []
    assert prefixes.longest(tokens(40), []) is None
    assert prefixes.longest(tokens(60), []) == Prefix(1, tokens(50))
    assert prefixes.longest(tokens(50), []) == Prefix(1, tokens(49))
    assert prefixes.keep(Prefix(2, tokens(30))) == [], "the longer one does not hold what follows it"
    assert prefixes.longest(tokens(25), []) == Prefix(2, tokens(24))
    assert prefixes.keep(Prefix(3, tokens(51))) == [1]


# -- the engine


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "CHUNK", 4)
    monkeypatch.setattr(kv_cache_manager, "CHUNK", 4)
    monkeypatch.setattr(loading, "SLACK", 17)  # enough for drafts and for policies that defer 15 tokens


def ask(engine: Engine, prompt: Sequence[int], **fields: Any) -> Completion:
    [[completion]] = engine.generate([Request(prompt=prompt, ignore_eos=True, **{"max_tokens": 12, **fields})])
    return completion


def emitted(completion: Completion) -> list[tuple[int, int]]:
    return [(token.id, token.layer) for token in completion.tokens]


def scheduler_of(engine: Engine) -> Any:
    return engine._scheduler


@pytest.mark.parametrize("second", MODES, ids=lambda mode: mode.get("mode", "full"))
@pytest.mark.parametrize("first", MODES, ids=lambda mode: mode.get("mode", "full"))
@pytest.mark.parametrize("family", ["llama3.1", "qwen2-window"])
def test_the_next_message_of_a_chat_reuses_kv(
    family: str, first: dict[str, Any], second: dict[str, Any], exit_stage: MakeStage, small: None
) -> None:
    """Whatever left early in one turn, the next says what it says by itself, and runs only what is new."""
    stage = exit_stage(family, [ExitSpec(1, "layer"), ExitSpec(2), ExitSpec(3, "norm")])
    engine = make_engine(stage, EngineOptions(prefix_cache_seqs=1))
    before = ask(engine, LONG, **first)
    history = [*LONG, *(token.id for token in before.tokens), 7, 8, 9]
    ran: list[int] = []
    handle = stage.backbone.layers["1"].attention.register_forward_hook(lambda _m, args, _o: ran.append(len(args[0])))
    try:
        after = ask(engine, history, **second)
    finally:
        handle.remove()
    reused = after.statistics["reused_tokens"]
    # The last token of an output is not run, and those that left early are not complete.
    assert reused == len(history) - 4 - before.statistics["deferred_tokens"]
    fell = after.statistics["proposed"] and 3 * after.statistics["rounds"]
    assert sum(ran) <= len(history) - reused + 11 + fell
    assert emitted(after) == emitted(ask(make_engine(stage), history, **second))
    assert engine.statistics()["reused_tokens"] == reused
    assert before.statistics["reused_tokens"] == 0


def test_many_deferred_tokens_leave_whole_windows(exit_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers before an exit run far ahead of the positions that are copied: they still have the window there."""
    monkeypatch.setattr(kv_cache, "CHUNK", 4)
    stage = exit_stage("gemma3", [ExitSpec(2)])
    assert stage.setup.architecture.windows[0] == 16
    engine = make_engine(stage, EngineOptions(prefix_cache_seqs=1))
    early = ThresholdPolicy(threshold=1e-6, max_deferred=100)
    ask(engine, LONG, mode="threshold", policy=early, max_tokens=33)
    after = ask(engine, [*LONG, 7, 8, 9])
    assert after.statistics["reused_tokens"] > 0
    alone = ask(make_engine(stage), [*LONG, 7, 8, 9])
    assert emitted(after) == emitted(alone)
    confidences = ([token.confidence for token in each.tokens] for each in (after, alone))
    assert next(confidences) == pytest.approx(next(confidences), abs=1e-5)


def test_copied_kv_equals_that_of_a_full_pass(exit_stage: MakeStage) -> None:
    stage = exit_stage("llama3.1", [ExitSpec(1, "layer"), ExitSpec(2)])
    engine = make_engine(stage, EngineOptions(prefix_cache_seqs=2))
    ask(engine, LONG, mode="threshold", policy=ThresholdPolicy(threshold=0.06))
    engine.submit(Request(prompt=[*LONG[:30], 99, 98, 97], max_tokens=5))
    engine.step()
    scheduler = scheduler_of(engine)
    [seq] = scheduler.running.values()
    row = scheduler.stages[0].sequences[seq.seq_id]
    reference = StageRunner(stage, 0, 64)
    reference.open(1, 33)
    reference.run(Pass(0, LAYERS + 1, (ScheduledSequence(1, 33, (*LONG[:30], 99, 98, 97)),)))
    assert seq.num_cached_tokens == 30
    for ours, theirs in zip(row.all_caches, reference.sequences[1].all_caches, strict=True):
        for mine, other in zip(ours.kept(), theirs.kept(), strict=True):
            assert mine.is_inference() == other.is_inference(), "compiled layers would be compiled again"
            stop = min(ours.length, theirs.length)
            assert stop >= 32
            torch.testing.assert_close(mine[:, :, :stop], other[:, :, :stop], atol=1e-5, rtol=0)


def test_running_sequences_share_their_prefix(exit_stage: MakeStage) -> None:
    stage = exit_stage("llama3.1", [ExitSpec(2)])
    engine = make_engine(stage, EngineOptions(prefix_cache_seqs=1))
    first = engine.submit(Request(prompt=LONG, mode="threshold", policy=ThresholdPolicy(threshold=0.06), max_tokens=12))
    for _ in range(6):
        engine.step()
    second = engine.submit(Request(prompt=[*LONG, 5, 6], max_tokens=8, samples=2))
    ends = {}
    while not engine.idle:
        for event in engine.step():
            if event.completion is not None:
                ends[event.request, event.sample] = event.completion
    [alone] = make_engine(stage).generate([Request(prompt=[*LONG, 5, 6], max_tokens=8, samples=2)])
    assert ends[second, 0].statistics["reused_tokens"] >= len(LONG) - 1
    assert [emitted(ends[second, sample]) for sample in range(2)] == [emitted(each) for each in alone]
    assert first in {request for request, _ in ends}


def test_samples_of_a_prompt_that_is_known_all_begin_with_it(exit_stage: MakeStage) -> None:
    stage = exit_stage("llama3.1", [ExitSpec(2)])
    engine = make_engine(stage, EngineOptions(prefix_cache_seqs=1))
    ask(engine, LONG)
    [outputs] = engine.generate([Request(prompt=LONG, max_tokens=8, samples=3)])
    assert [each.statistics["reused_tokens"] for each in outputs] == [len(LONG) - 1] * 3
    [alone] = make_engine(stage).generate([Request(prompt=LONG, max_tokens=8, samples=3)])
    assert [emitted(each) for each in outputs] == [emitted(each) for each in alone]


def test_kept_sequences_are_evicted_before_any_is_preempted(exit_stage: MakeStage, small: None) -> None:
    """Waiting and growing sequences get the memory of finished ones first."""
    stage = exit_stage("llama3.1", [ExitSpec(2)])
    needed = scheduler_of(make_engine(stage)).kv_caches.budget.needed(52, 52)
    engine = make_engine(stage, EngineOptions(prefix_cache_seqs=8, kv_memory=2 * needed))
    scheduler = scheduler_of(engine)
    budget, prefixes = scheduler.kv_caches.budget, scheduler.kv_caches.prefixes
    for start in range(5):
        prompt = [start, *LONG[1:]]
        expected = emitted(ask(make_engine(stage), prompt))
        assert emitted(ask(engine, prompt)) == expected
        assert set(scheduler.stages[0].sequences) == set(prefixes.seq_ids) == set(budget._claims)
        assert budget.used <= budget.total
    assert 1 <= len(prefixes.seq_ids) <= 2 and scheduler.num_preempted == 0


def test_a_preempted_sequence_reuses_no_more_than_its_prompt(exit_stage: MakeStage, small: None) -> None:
    """It copies emitted tokens too, from another sequence with the same text."""
    stage = exit_stage("llama3.1", [ExitSpec(2)])
    budget = scheduler_of(make_engine(stage)).kv_caches.budget
    end = len(LONG) + 12
    room = 2 * budget.needed(end, end) + budget.needed(8, 8)
    engine = make_engine(stage, EngineOptions(prefix_cache_seqs=1, kv_memory=room))
    asked = [([1, 2, 3], 10), (LONG, 12), (LONG, 12)]  # the first ends and makes room for the last to run again
    requests = [Request(prompt=prompt, ignore_eos=True, max_tokens=count) for prompt, count in asked]
    _, [one], [other] = engine.generate(requests)
    assert scheduler_of(engine).num_preempted > 0 and emitted(one) == emitted(other)
    assert [each.statistics["reused_tokens"] for each in (one, other)] == [0, len(LONG)]


def test_the_kv_of_a_cancelled_sequence_is_reused(exit_stage: MakeStage) -> None:
    stage = exit_stage("llama3.1", [ExitSpec(2)])
    engine = make_engine(stage, EngineOptions(prefix_cache_seqs=2))
    number = engine.submit(
        Request(prompt=LONG, mode="threshold", policy=ThresholdPolicy(threshold=0.06), max_tokens=30)
    )
    seen: list[int] = []
    while len(seen) < 5:
        seen += [token.id for event in engine.step() for token in event.tokens]
    engine.cancel(number)
    scheduler = scheduler_of(engine)
    [row] = scheduler.stages[0].sequences.values()
    [lengths] = [{cache.length for cache in row.all_caches}]
    assert len(lengths) == 1 and lengths.pop() >= len(LONG) and not row.waiting
    after = ask(engine, [*LONG, *seen, 1])
    assert after.statistics["reused_tokens"] >= len(LONG)
    assert emitted(after) == emitted(ask(make_engine(stage), [*LONG, *seen, 1]))


def test_a_failed_sequence_is_not_kept_for_reuse(exit_stage: MakeStage) -> None:
    stage = exit_stage("llama3.1", [ExitSpec(2)])
    engine = make_engine(stage, EngineOptions(prefix_cache_seqs=2))
    with torch.no_grad():
        stage.exits[0].head.matrix.weight[50] = float("nan")
    engine.submit(Request(prompt=LONG, mode="threshold", policy=ThresholdPolicy(threshold=0.06), max_tokens=4))
    while not engine.idle:
        engine.step()
    assert not scheduler_of(engine).stages[0].sequences and scheduler_of(engine).kv_caches.budget.used == 0
