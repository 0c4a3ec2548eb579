"""Gradients on their way to host memory: whose buffers take memory at a time, and what is copied."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.config.exits import ExitSpec
from megatron_ee.parallel.groups import Groups
from megatron_ee.parallel.host_gradients import HostGradients
from megatron_ee.testing.deepspeed import stand_in_deepspeed
from megatron_ee.testing.tuning import Case, prepare, random_batches
from megatron_ee.tuning.step import StepResult, tuning_step

EXITS = (ExitSpec(1, "norm"), ExitSpec(2, "mlp", "shared"), ExitSpec(4, "mlp", "shared"))


@pytest.fixture(scope="module")
def model(saved_model: Callable[..., tuple[Path, Any]]) -> Path:
    return saved_model("llama3.1")[0]


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in stand_in_deepspeed().items():
        monkeypatch.setitem(sys.modules, name, module)


def step(model: Path, groups: Groups, residency: str, micro_batch_size: int) -> tuple[StepResult, Any, Any]:
    case = Case(
        "host", "llama3.1", EXITS, (((1, 4), (1, 2, 4)),), implementation="deepspeed_cpu",
        residency=residency, micro_batch_size=micro_batch_size,  # type: ignore[arg-type]
    )  # fmt: skip
    pipeline, optimizer = prepare(model, case, groups)
    batches = random_batches(131, 0, 0, 1, micro_batch_size)
    return tuning_step(pipeline, optimizer, batches, case.loss, 1.0), pipeline, optimizer


@pytest.mark.parametrize(
    ("residency", "micro_batch_size", "most"),
    [("disk", 4, 1), ("device", 12, 1), ("device", 4, 3)],  # several microbatches, one, several
)
def test_gradients_take_memory_until_their_exit_is_done(
    residency: str,
    micro_batch_size: int,
    most: int,
    model: Path,
    groups: Groups,
    deepspeed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[int] = []
    found: set[HostGradients] = set()
    begin = HostGradients.begin

    def counted(self: HostGradients) -> None:
        begin(self)
        found.add(self)
        held.append(sum(gradients.untyped_storage().nbytes() > 0 for each in found for gradients, _ in each._buffers))

    monkeypatch.setattr(HostGradients, "begin", counted)
    result, _, _ = step(model, groups, residency, micro_batch_size)
    assert len(found) == 3 and max(held) == most
    assert not any(each.allocated for each in found)
    assert all(exit_.grad_norm > 0 for exit_ in result.exits)


def test_what_is_copied_is_what_was_summed(model: Path, groups: Groups, deepspeed: None) -> None:
    result, pipeline, optimizer = step(model, groups, "disk", 4)
    for exit_, of_step in zip(pipeline.stage.exits, result.exits, strict=True):
        gradients = [optimizer.gradient(p).double() for p in exit_.parameters() if p.requires_grad]
        # In the meantime they were clipped.
        total = torch.cat(gradients).norm() * max(1.0, result.grad_norm / 0.05)
        assert float(total) == pytest.approx(of_step.grad_norm, rel=1e-4)
