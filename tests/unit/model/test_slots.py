"""Layers that share the memory of a few of them compute what layers with memory of their own compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.requests import Request
from megatron_ee.model.slots import Event, Slot
from megatron_ee.testing.tuning import layer_outputs

LoadStage = Callable[..., Stage]
SavedModel = Callable[..., tuple[Path, Any]]
EXITS = [ExitSpec(2, "mlp"), ExitSpec(3, "norm", "shared")]


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("family", ["gemma3", "llama-biases", "qwen3", "olmo2"])
def test_taps_equal_those_of_a_resident_backbone(
    family: str, slots: int, saved_model: SavedModel, load_stage: LoadStage
) -> None:
    path, _ = saved_model(family)
    resident, shared = load_stage(path, EXITS), load_stage(path, EXITS, slots=slots)
    for _ in range(2):  # the second time begins with the last layer's weights in a slot
        for expected, found in zip(layer_outputs(resident), layer_outputs(shared), strict=True):
            assert torch.equal(found, expected)


def test_every_mode_emits_the_same_tokens(saved_model: SavedModel, load_stage: LoadStage) -> None:
    path, _ = saved_model("llama3.1")
    requests = [
        Request(prompt=[5, 17, 99], max_tokens=12, mode=mode)  # type: ignore[arg-type]
        for mode in ("full", "threshold", "speculative")
    ]
    expected, found = (make_engine(load_stage(path, EXITS, slots=slots)).generate(requests) for slots in (0, 1))
    assert [[token.id for token in each.tokens] for [each] in found] == [
        [token.id for token in each.tokens] for [each] in expected
    ]


def test_only_the_slots_take_memory(saved_model: SavedModel, load_stage: LoadStage) -> None:
    path, _ = saved_model("llama3.1")
    resident, shared = (load_stage(path, slots=slots).backbone for slots in (0, 2))
    layer = sum(each.numel() for each in resident.layers["1"].parameters())
    assert not any(each.is_meta for each in shared.parameters())
    used = {id(each.mlp.down.weight) for _, each in shared.layers_between(1, 4)}
    assert len(used) == 2 and sum(each.numel() for each in shared.layers.parameters()) == 2 * layer


def test_a_slot_is_filled_again_after_a_failure(saved_model: SavedModel, load_stage: LoadStage) -> None:
    path, _ = saved_model("llama3.1")
    expected, stage = layer_outputs(load_stage(path)), load_stage(path, slots=1)
    slots = stage.backbone.slots
    assert slots is not None and slots.fill is not None
    fill, failures, calls = slots.fill, [3], []

    def failing(number: int, slot: Slot, event: Event) -> None:
        calls.append(number)
        if number in failures:
            slot.memory.zero_()
            raise OSError("gone")
        fill(number, slot, event)

    slots.fill = failing
    with pytest.raises(OSError):
        layer_outputs(stage)
    failures.clear()
    assert torch.equal(layer_outputs(stage)[0], expected[0])
    assert calls == [1, 2, 3, 1, 2, 3, 4]
