"""Tuning over a streamed backbone gives bit for bit what tuning over a resident one gives, on several ranks too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import DistillationConfig, LossConfig
from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.formats import open_contents
from megatron_ee.conversion.to_parallel import to_parallel
from megatron_ee.testing.project import saved_tensors
from megatron_ee.testing.ranks import run_ranks
from megatron_ee.testing.tuning import STEPS, Case, tune_cases

EVERY_BODY = (
    ExitSpec(1, "embedding", "own"),
    ExitSpec(2, "mlp", "shared", weight=0.5),
    ExitSpec(3, "norm", "low_rank", rank=4),
    ExitSpec(4, "layer", "own"),
)
ONE = (((1, 4), (1, 2, 3, 4)),)
PLAIN = LossConfig(chunk_tokens=7, dynamic_token_weights=True)
DISTILLED = LossConfig(chunk_tokens=9, distillation=DistillationConfig(kl=0.7, cross_entropy=0.4, top_k=5))
RESIDENCIES = ("device", "host", "disk")
WORK = ("layer", "exits")
BY_LAYER = [
    *(("layer", 1), ("exits", 1)),
    *(("layer", 2), ("exits", 2), ("layer", 2)),  # the exit reads the residual between the layer's halves
    *(("layer", 3), ("exits", 3)),
    *(("layer", 4), ("exits", 4)),
]
AFTER_ALL_LAYERS = [event for event in BY_LAYER if event[0] == "layer"]


def _cases(name: str, model: str, **settings: Any) -> list[Case]:
    return [
        dataclasses.replace(
            Case(f"{name}-{residency}", model, EVERY_BODY, ONE, micro_batch_size=2, **settings), residency=residency
        )
        for residency in RESIDENCIES
    ]


@pytest.fixture(scope="module")
def models(saved_model: Callable[..., tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    released = saved_model("qwen3")[0]
    parallel = tmp_path_factory.mktemp("parallel") / "model"
    write_output(to_parallel(open_contents(released), tensor=2, stages=[1, 3]), parallel)
    return {"released": released, "parallel": parallel}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_equal_those_over_a_resident_backbone(ranks: int, models: dict[str, Path], tmp_path: Path) -> None:
    cases = {
        1: _cases("taught", "released", loss=DISTILLED, dtype="bfloat16"),
        2: [
            *_cases("data", "released", loss=PLAIN),
            *_cases("tensor", "parallel", loss=PLAIN, tensor=2, sequence=True, dtype="bfloat16"),
        ],
    }[ranks]
    outcomes = run_ranks(ranks, tune_cases, models, cases, tmp_path)
    for place in range(0, len(cases), len(RESIDENCIES)):
        resident = cases[place]
        expected = saved_tensors(tmp_path / resident.name / f"step-{STEPS}")
        for offset in range(1, len(RESIDENCIES)):
            for rank in outcomes:
                assert rank[place + offset].results == rank[place].results
                work = [(event.kind, event.number) for event in rank[place + offset].events if event.kind in WORK]
                assert work == (AFTER_ALL_LAYERS if resident.loss is DISTILLED else BY_LAYER)
            found = saved_tensors(tmp_path / cases[place + offset].name / f"step-{STEPS}")
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(found[key], tensor), f"{cases[place + offset].name}: {key}"
