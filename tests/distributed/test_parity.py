"""Every layout that fits four processes computes what one process does: losses, gradients, weights, optimizer state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import DistillationConfig, LossConfig
from megatron_ee.testing.project import saved_tensors
from megatron_ee.testing.ranks import run_ranks
from megatron_ee.testing.tuning import STEPS, Case, Outcome, tune_cases

FAMILIES = {"llama2": {}, "qwen3": {}, "llama3.2-tied": {}}
EVERY_BODY = (
    ExitSpec(1, "embedding", "own"),
    ExitSpec(2, "mlp", "shared", weight=0.5),
    ExitSpec(3, "norm", "low_rank", rank=4),
    ExitSpec(4, "layer", "own"),
)
OTHER_HEADS = (
    ExitSpec(1, "mlp", "own", init="random"),
    ExitSpec(2, "layer", "shared"),
    ExitSpec(3, "embedding", "own"),
    ExitSpec(4, "mlp", "low_rank", rank=4),
)
EARLY = (ExitSpec(1, "mlp", "own"), ExitSpec(2, "norm", "shared"))
PLAIN, DYNAMIC = LossConfig(chunk_tokens=7), LossConfig(dynamic_token_weights=True)
DISTILLED = LossConfig(
    chunk_tokens=9, distillation=DistillationConfig(kl=0.7, cross_entropy=0.4, temperature=2.0, top_k=5)
)
WORK: dict[str, tuple[str, tuple[ExitSpec, ...], LossConfig]] = {
    "bodies": ("llama2", EVERY_BODY, PLAIN),
    "qwen3": ("qwen3", OTHER_HEADS, DYNAMIC),
    "tied": ("llama3.2-tied", EVERY_BODY, PLAIN),
    "early": ("llama2", EARLY, DISTILLED),
    "distilled": ("llama2", EVERY_BODY, dataclasses.replace(DISTILLED, dynamic_token_weights=True)),
}
ONE = (((1, 4), (1, 2, 3, 4)),)
HALVES = (((1, 2), (1, 2)), ((3, 4), (3, 4)))
UNEVEN = (((1, 3), (1, 2, 3)), ((4, 4), (4,)))
APART = (((1, 4), ()), (None, (1, 2, 3, 4)))
THIRDS = (((1, 1), (1,)), ((2, 3), (2, 3)), ((4, 4), (4,)))
MIXED = (((1, 2), (2,)), ((3, 4), ()), (None, (1, 3, 4)))
QUARTERS = (((1, 1), (1,)), ((2, 2), (2,)), ((3, 3), (3,)), ((4, 4), (4,)))
SPREAD = (((1, 3), (1,)), ((4, 4), ()), (None, (2, 4)), (None, (3,)))
EARLY_ONE, EARLY_HALVES = (((1, 4), (1, 2)),), (((1, 3), (1, 2)), ((4, 4), ()))
EARLY_APART = (((1, 1), ()), ((2, 4), ()), (None, (1, 2)))


def _cases(world_size: int, more: bool = False) -> list[Case]:
    """(work, stages, tensor, sequence, microbatch): the rest of the ranks are data-parallel.

    Few microbatches where their number proves nothing: ranks that share two cores wait at every message. ``more`` gives
    further combinations of what the others have already.
    """
    table: dict[int, list[tuple[str, Any, int, bool, int]]] = {
        1: [(work, EARLY_ONE if work == "early" else ONE, 1, False, 1) for work in WORK],
        2: [
            ("bodies", ONE, 2, True, 4),
            ("bodies", APART, 1, False, 3),
            ("qwen3", ONE, 2, True, 3),
            ("qwen3", HALVES, 1, False, 12),
            ("distilled", APART, 1, False, 2),
            ("early", EARLY_HALVES, 1, False, 1),
        ],
        3: [
            ("bodies", THIRDS, 1, False, 2),
            ("bodies", MIXED, 1, False, 6),
            ("bodies", ONE, 1, False, 2),
            ("distilled", THIRDS, 1, False, 1),
            ("distilled", MIXED, 1, False, 12),
            ("early", EARLY_APART, 1, False, 2),
        ],
        4: [
            ("bodies", ONE, 4, True, 3),
            ("bodies", QUARTERS, 1, False, 6),
            ("bodies", SPREAD, 1, False, 2),
            ("bodies", HALVES, 1, False, 2),
            ("qwen3", UNEVEN, 2, True, 2),
            ("qwen3", ONE, 2, False, 3),
            ("distilled", HALVES, 2, True, 2),
            ("distilled", SPREAD, 1, False, 1),
        ],
    }
    further: dict[int, list[tuple[str, Any, int, bool, int]]] = {
        2: [
            ("bodies", ONE, 2, False, 3),
            ("bodies", UNEVEN, 1, False, 1),
            ("bodies", ONE, 1, False, 2),
            ("qwen3", ONE, 2, False, 4),
            ("tied", ONE, 2, True, 6),
            ("tied", APART, 1, False, 2),
            ("distilled", ONE, 2, True, 4),
        ],
        4: [
            ("bodies", ONE, 4, False, 4),
            ("bodies", ONE, 1, False, 1),
            ("bodies", APART, 2, True, 2),
            ("bodies", ONE, 2, True, 3),
            ("tied", UNEVEN, 2, False, 3),
            ("distilled", APART, 1, False, 2),
            ("distilled", ONE, 2, False, 3),
        ],
    }
    return [
        Case(f"{number}-{work}", family, specs, stages, tensor, sequence, loss, micro_batch_size=micro)
        for number, (work, stages, tensor, sequence, micro) in enumerate((further if more else table)[world_size])
        for family, specs, loss in [WORK[work]]
    ]


Models = dict[str, Path]


@pytest.fixture(scope="module")
def models(saved_model: Callable[..., tuple[Path, Any]]) -> Models:
    return {family: saved_model(family, **changes)[0] for family, changes in FAMILIES.items()}


@pytest.fixture(scope="module")
def alone(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What one process computes, by work."""
    cases = _cases(1)
    (outcomes,) = run_ranks(1, tune_cases, models, cases, tmp_path_factory.mktemp("alone"))
    return {case.name.partition("-")[2]: outcome for case, outcome in zip(cases, outcomes, strict=True)}


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (2, False),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((2, True), (3, False), (4, False), (4, True))),
    ],
)
def test_layouts_compute_what_one_process_does(
    world_size: int, more: bool, models: Models, alone: dict[str, Outcome], tmp_path: Path
) -> None:
    cases = _cases(world_size, more)
    ranks = run_ranks(world_size, tune_cases, models, cases, tmp_path)
    for number, case in enumerate(cases):
        expected = alone[case.name.partition("-")[2]]
        for rank in ranks:
            _check_results(case, rank[number], expected)
        for path, reference in zip(ranks[0][number].checkpoints, expected.checkpoints, strict=True):
            _check_state(case, saved_tensors(path), saved_tensors(reference))


def _check_results(case: Case, found: Outcome, expected: Outcome) -> None:
    for step, (mine, theirs) in enumerate(zip(found.results, expected.results, strict=True)):
        where = (case.name, step)
        assert mine.tokens == theirs.tokens and mine.lr == theirs.lr and not mine.skipped, where
        for exit_, reference in zip(mine.exits, theirs.exits, strict=True):
            assert exit_.layer == reference.layer
            assert exit_.loss == pytest.approx(reference.loss, rel=1e-5), (*where, exit_)
            assert exit_.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5), (*where, exit_)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5), where


def _check_state(case: Case, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Weights, and Adam's moments, the first of which is the gradient after one step."""
    assert found.keys() == expected.keys(), case.name
    for key, tensor in expected.items():
        difference, largest = (found[key] - tensor).abs().max().item(), tensor.abs().max().item()
        # The second moment is a square, whose relative error is twice as large.
        assert difference <= (2e-5 if "exp_avg_sq" in key else 1e-5) * largest + 1e-12, (
            case.name,
            key,
            difference,
            largest,
        )


ELSEWHERE: tuple[tuple[int, Any, int, bool], ...] = (
    (2, ONE, 2, True),
    (3, MIXED, 1, False),
    (4, UNEVEN, 2, True),
    (4, APART, 1, False),
)


def _moved(family: str, specs: tuple[ExitSpec, ...], dtype: str) -> list[tuple[int, Case]]:
    case = Case("moved", family, specs, ONE, loss=PLAIN, dtype=dtype)
    return [
        (size, dataclasses.replace(case, stages=stages, tensor=tensor, sequence=sequence))
        for size, stages, tensor, sequence in ((1, ONE, 1, False), *ELSEWHERE)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_a_run_goes_on_in_another_layout(number: int, models: Models, tmp_path: Path) -> None:
    """From one process to a layout, and from it back to one process."""
    (_, case), *elsewhere = _moved("llama2", EVERY_BODY, "float32")
    size, there = elsewhere[number]
    ((straight,),) = run_ranks(1, tune_cases, models, [case], tmp_path / "alone")
    expected = saved_tensors(straight.checkpoints[-1])
    ranks = run_ranks(size, tune_cases, models, [there], tmp_path / "begun", tmp_path / "alone")
    _check_state(there, saved_tensors(ranks[0][0].checkpoints[-1]), expected)
    run_ranks(size, tune_cases, models, [there], tmp_path / "own")
    ((returned,),) = run_ranks(1, tune_cases, models, [case], tmp_path / "back", tmp_path / "own")
    _check_state(there, saved_tensors(returned.checkpoints[-1]), expected)


@pytest.mark.slow
def test_decay_towards_initial_values_in_any_layout_and_after_resuming(models: Models, tmp_path: Path) -> None:
    """Strong enough to count: a twentieth of the distance at each step."""
    plain = Case("float32", "llama2", EVERY_BODY, ONE, loss=PLAIN, weight_decay=5.0)
    case = dataclasses.replace(plain, decay_towards="initial")
    half = dataclasses.replace(case, name="bfloat16", dtype="bfloat16")
    tensor = dataclasses.replace(case, name="tensor", tensor=2, sequence=True, micro_batch_size=4)
    data = dataclasses.replace(case, name="data", micro_batch_size=3)
    alone, again, two, moved = (tmp_path / name for name in ("alone", "again", "two", "moved"))
    run_ranks(1, tune_cases, models, [case, half, dataclasses.replace(plain, name="zero")], alone)
    run_ranks(1, tune_cases, models, [case, half], again, alone)
    run_ranks(2, tune_cases, models, [tensor, data], two)
    run_ranks(1, tune_cases, models, [dataclasses.replace(case, name=name) for name in ("tensor", "data")], moved, two)

    last = f"step-{STEPS}"
    for name in ("float32", "bfloat16"):
        expected, found = (saved_tensors(place / name / last) for place in (alone, again))
        assert any(key.startswith("optimizer.initial.") for key in expected)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name
    expected = saved_tensors(alone / "float32" / last)
    for place in (two, moved):
        for each in (tensor, data):
            _check_state(each, saved_tensors(place / each.name / last), expected)

    towards_zero = saved_tensors(alone / "zero" / last)
    for key, start in expected.items():
        if key.startswith("optimizer.initial."):
            name = key.removeprefix("optimizer.initial.")
            assert start.dim() == 2 and (expected[name] - start).norm() < (towards_zero[name] - start).norm(), name


@pytest.mark.parametrize(
    "family, specs", [("llama2", EVERY_BODY), pytest.param("qwen3", OTHER_HEADS, marks=pytest.mark.slow)]
)
def test_a_checkpoint_moves_through_layouts_bit_for_bit(
    family: str, specs: tuple[ExitSpec, ...], models: Models, tmp_path: Path
) -> None:
    """bfloat16 with its float32 main weights, loaded and saved again by one layout after another."""
    (_, case), *elsewhere = _moved(family, specs, "bfloat16")
    before, expected = tmp_path / "first", None
    ((first,),) = run_ranks(1, tune_cases, models, [case], before)
    expected = saved_tensors(first.checkpoints[0])
    assert any(key.startswith("optimizer.remainder.") for key in expected)
    for number, (size, there) in enumerate(elsewhere):
        output = tmp_path / str(number)
        ranks = run_ranks(size, tune_cases, models, [there], output, before, 1)
        found = saved_tensors(ranks[0][0].checkpoints[-1])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), there.name
        before = output
