"""Memory of keys and values: what sequences claim, who waits, who is preempted, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

import megatron_ee.inference.kv_cache as kv_cache
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError
from megatron_ee.exits.stage import Stage
from megatron_ee.inference import kv_cache_manager, loading
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.kv_cache import CHUNK
from megatron_ee.inference.kv_cache_manager import KVBudget, StageMemory, stage_kv_memory
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Completion, Draft, Request
from megatron_ee.inference.sampling import Sampling

MakeStage = Callable[[str, Sequence[ExitSpec]], Stage]

EXITS = [ExitSpec(1, "layer"), ExitSpec(2), ExitSpec(3, "norm", "shared")]


# -- figures


def test_a_sequence_claims_whole_chunks_up_to_its_limit() -> None:
    budget = KVBudget(10**9, [StageMemory(10, (None, None, None))], slack=17, pass_tokens=512)
    assert budget.needed(10_000, 1) == 3 * CHUNK * 10
    assert budget.needed(10_000, CHUNK) == 3 * CHUNK * 10
    assert budget.needed(10_000, CHUNK + 1) == 2 * 3 * CHUNK * 10
    assert budget.needed(300, CHUNK + 1) == 3 * 300 * 10
    assert budget.needed(7, 3) == 3 * 7 * 10


def test_windows_bound_what_a_layer_takes() -> None:
    budget = KVBudget(10**9, [StageMemory(1, (None, 1000, 1000))], slack=24, pass_tokens=512)
    bound = 1536 // CHUNK * CHUNK
    assert budget.needed(10**6, 100 * CHUNK) == 100 * CHUNK + 2 * bound
    assert budget.needed(10**6, CHUNK) == 3 * CHUNK


def test_the_fullest_stage_counts() -> None:
    budget = KVBudget(1, [StageMemory(10, (None,)), StageMemory(10, (None, None))], slack=0, pass_tokens=1)
    assert budget.needed(CHUNK, CHUNK) == 2 * CHUNK * 10


def test_a_refused_claim_changes_nothing_and_release_frees_all() -> None:
    budget = KVBudget(4 * CHUNK, [StageMemory(1, (None,))], slack=0, pass_tokens=1)
    assert budget.claim(1, 10_000, 3 * CHUNK) and budget.used == 3 * CHUNK
    assert budget.claim(1, 10_000, 5) and budget.used == 3 * CHUNK  # it has more
    assert not budget.claim(2, 10_000, CHUNK + 1) and budget.used == 3 * CHUNK
    assert budget.claim(2, 10_000, CHUNK) and budget.used == 4 * CHUNK
    assert not budget.claim(1, 10_000, 3 * CHUNK + 1) and budget.used == 4 * CHUNK
    budget.release(1)
    assert budget.used == CHUNK
    assert budget.claim(2, 10_000, 4 * CHUNK) and budget.used == 4 * CHUNK
    budget.release(2)
    budget.release(3)  # has claimed nothing
    assert budget.used == 0


@pytest.mark.parametrize("tensor, heads", [(1, 2), (2, 1), (4, 1)])
def test_a_stage_keeps_its_layers_and_those_of_its_exits(tensor: int, heads: int, exit_stage: MakeStage) -> None:
    arch: Architecture = exit_stage("qwen2-window", EXITS).setup.architecture
    kept = stage_kv_memory(arch, [2, 3], EXITS[:1] + [ExitSpec(3)], tensor, 2)
    assert kept.position_bytes == 2 * heads * arch.head_dim * 2
    assert kept.windows == (arch.windows[1], arch.windows[2], arch.windows[3])
    assert set(arch.windows) == {None, 16}


# -- the engine under pressure


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of a few tokens grow through several chunks."""
    monkeypatch.setattr(kv_cache, "CHUNK", 8)
    monkeypatch.setattr(kv_cache_manager, "CHUNK", 8)
    monkeypatch.setattr(loading, "SLACK", 17)  # enough for drafts and for policies that defer 15 tokens


def scheduler_of(engine: Engine) -> Any:
    return engine._scheduler


def bytes_kept(engine: Engine) -> int:
    """What the sequences' caches really take."""
    caches = [cache for row in scheduler_of(engine).stages[0].sequences.values() for cache in row.all_caches]
    return sum(part.untyped_storage().nbytes() for cache in caches for part in cache._kept or ())


def run_all(engine: Engine, requests: Sequence[Request]) -> list[list[Completion]]:
    """Answers by request and sample; at each step memory is within its bounds, at the end nothing is left."""
    scheduler, found = scheduler_of(engine), {}
    numbers = [engine.submit(request) for request in requests]
    for _ in range(20_000):
        if engine.idle:
            break
        for event in engine.step():
            assert event.error is None
            if event.completion is not None:
                found[event.request, event.sample] = event.completion
        assert bytes_kept(engine) <= scheduler.kv_caches.budget.used <= scheduler.kv_caches.budget.total
        assert (
            set(scheduler.stages[0].sequences) == set(scheduler.running)
            and len(scheduler.running) <= scheduler.max_num_seqs
        )
        assert set(scheduler.kv_caches.budget._claims) == set(scheduler.running)
    assert engine.idle, "it runs in circles"
    assert scheduler.kv_caches.budget.used == 0 and not scheduler.stages[0].sequences and not engine._outputs
    return [[found[n, i] for i in range(r.samples)] for n, r in zip(numbers, requests, strict=True)]


def summary(completion: Completion) -> tuple[Any, ...]:
    return [(token.id, token.layer) for token in completion.tokens], completion.finish_reason


def requests() -> list[Request]:
    """Each of which grows far beyond its prompt."""
    drawn = Sampling(temperature=0.9, seed=4)
    return [
        Request(prompt=[5, 6, 7], max_tokens=60),
        Request(prompt=[9, 8], mode="threshold", policy=ThresholdPolicy(threshold=0.1), max_tokens=50),
        Request(prompt=[3] * 20, mode="speculative", draft=Draft(exit=2, length=3), max_tokens=40),
        Request(prompt=[11, 12], mode="speculative", draft=Draft(exit=3, length=2), sampling=drawn, max_tokens=45),
        Request(prompt=[30, 31, 32, 33], sampling=drawn, samples=3, max_tokens=30),
        Request(
            prompt=[64] * 9, mode="threshold", policy=ThresholdPolicy(threshold=0.05), sampling=drawn, max_tokens=40
        ),
    ]


def memory_for(stage: Stage, *lengths: int) -> int:
    """Bytes of full sequences of these many positions."""
    budget = scheduler_of(make_engine(stage)).kv_caches.budget
    return sum(budget.needed(length, length) for length in lengths)


@pytest.mark.parametrize("rows", [*(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 3)), 2])
def test_waiting_and_preemption_do_not_change_the_output(rows: int, exit_stage: MakeStage, small_chunks: None) -> None:
    stage = exit_stage("qwen2-window", EXITS)
    alone = [make_engine(stage).generate([request])[0] for request in requests()]
    engine = make_engine(stage, EngineOptions(kv_memory=memory_for(stage, *[63] * rows), max_num_seqs=6))
    pressed = run_all(engine, requests())
    for request, ours, theirs in zip(requests(), pressed, alone, strict=True):
        assert [summary(one) for one in ours] == [summary(one) for one in theirs], request
    assert engine.statistics()["num_preempted"] == scheduler_of(engine).num_preempted > 0


def test_the_youngest_is_preempted_and_the_oldest_never(exit_stage: MakeStage, small_chunks: None) -> None:
    stage = exit_stage("llama2", EXITS)
    engine = make_engine(stage, EngineOptions(kv_memory=memory_for(stage, 40, 16), max_num_seqs=4))
    numbers = [engine.submit(Request(prompt=[5, 6, 7, number], max_tokens=36)) for number in range(3)]
    ended, rows, left = [], scheduler_of(engine).running, []
    while not engine.idle:
        before = list(rows)
        for event in engine.step():
            if event.completion is not None:
                ended.append(event.request)
                assert event.completion.statistics["layers_per_token"] == 4, "tokens that run again are counted"
        left += [row for row in before if row not in rows]
    assert ended == numbers
    assert left[0] == 3 and left.count(1) == 1 and scheduler_of(engine).num_preempted > 0


def test_a_sequence_that_fills_the_memory_runs_alone(exit_stage: MakeStage, small_chunks: None) -> None:
    stage = exit_stage("llama2", EXITS)
    engine = make_engine(stage, EngineOptions(kv_memory=memory_for(stage, 63), max_num_seqs=4))
    just = [
        Request(prompt=[5, 6, 7], mode=mode, policy=ThresholdPolicy(threshold=0.1), max_tokens=60)
        for mode in ("full", "threshold", "speculative")
    ]
    for [completion] in run_all(engine, just):
        assert len(completion.tokens) == 60


def test_a_request_that_can_never_fit_is_refused_at_once(exit_stage: MakeStage, small_chunks: None) -> None:
    stage = exit_stage("llama2", EXITS)
    engine = make_engine(stage, EngineOptions(kv_memory=memory_for(stage, 40), max_num_seqs=4))
    running = engine.submit(Request(prompt=[5, 6, 7], max_tokens=36))
    engine.step()
    message = r"^max_tokens: 48 positions need .* MB of KV cache, but it may have .* MB; ask for fewer"
    for prompt, count in (([5] * 8, 40), ([5] * 40, 8)):
        with pytest.raises(ConfigError, match=message):
            engine.submit(Request(prompt=prompt, max_tokens=count))
    [last] = [event for event in engine.stream(running) if event.completion is not None]
    assert last.completion is not None and len(last.completion.tokens) == 36
    assert engine.idle and scheduler_of(engine).kv_caches.budget.used == 0


@pytest.mark.parametrize("after", range(0, 60, 7))
def test_nothing_leaks_when_all_are_cancelled(after: int, exit_stage: MakeStage, small_chunks: None) -> None:
    stage = exit_stage("llama2", EXITS)
    engine = make_engine(stage, EngineOptions(kv_memory=memory_for(stage, 63, 40), max_num_seqs=5))
    numbers = [engine.submit(request) for request in requests()]
    for _ in range(after):
        engine.step()
    for number in numbers[::-1]:
        engine.cancel(number)
        engine.cancel(number)
    scheduler = scheduler_of(engine)
    assert (
        scheduler.idle
        and scheduler.kv_caches.budget.used == 0
        and not scheduler.stages[0].sequences
        and not scheduler.kv_caches.budget._claims
    )
    ends = [event for event in engine.step() if event.completion is not None]
    assert engine.idle and {event.completion.finish_reason for event in ends} == {"cancelled"}  # type: ignore[union-attr]


def test_samples_continue_after_the_first_is_preempted(exit_stage: MakeStage, small_chunks: None) -> None:
    stage = exit_stage("llama2", EXITS)
    request = Request(prompt=[30] * 20, sampling=Sampling(temperature=0.9), samples=4, max_tokens=40)
    singles = [
        request.model_copy(update={"samples": 1, "sampling": Sampling(temperature=0.9, seed=seed)}) for seed in range(4)
    ]
    engine = make_engine(stage, EngineOptions(kv_memory=memory_for(stage, 60, 48), max_num_seqs=4))
    [ours] = run_all(engine, [request])
    theirs = [make_engine(stage).generate([single])[0][0] for single in singles]
    assert [summary(one) for one in ours] == [summary(one) for one in theirs]
    assert scheduler_of(engine).num_preempted > 0
