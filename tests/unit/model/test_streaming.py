"""A backbone whose layers come from host memory or from files computes what one in the device's memory computes."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.model.slots import Event, Slot
from megatron_ee.parallel.groups import Groups
from megatron_ee.testing.tuning import Case, layer_outputs, prepare, random_batches
from megatron_ee.tuning.step import tuning_step

LoadStage = Callable[..., Stage]
SavedModel = Callable[..., tuple[Path, Any]]
EXITS = [ExitSpec(2, "mlp"), ExitSpec(3, "norm", "shared")]


@pytest.mark.parametrize("residency", ["host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taps_equal_those_of_a_resident_backbone(
    dtype: torch.dtype, residency: str, saved_model: SavedModel, load_stage: LoadStage
) -> None:
    path, _ = saved_model("gemma3")
    resident = load_stage(path, EXITS, dtype=dtype)
    streamed = load_stage(path, EXITS, dtype=dtype, residency=residency)
    assert streamed.backbone.slots is not None and len(streamed.backbone.slots.slots) == 2
    for _ in range(2):
        for expected, found in zip(layer_outputs(resident), layer_outputs(streamed), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_layers(count: int, saved_model: SavedModel, load_stage: LoadStage) -> None:
    """After the last layer the first one is read again, also where both would want the same slot."""
    path, _ = saved_model("llama3.1")
    layers = range(1, count + 1)
    resident, streamed = (
        load_stage(path, layers=layers, final_exit=False, residency=residency) for residency in ("device", "disk")
    )
    for _ in range(3):
        assert torch.equal(layer_outputs(streamed)[0], layer_outputs(resident)[0])


def test_the_next_layer_is_read_while_one_computes(saved_model: SavedModel, load_stage: LoadStage) -> None:
    stage = load_stage(saved_model("llama3.1")[0], residency="disk")
    slots = stage.backbone.slots
    assert slots is not None and slots.fill is not None
    fill, started = slots.fill, {number: threading.Event() for number in slots.numbers}

    def watched(number: int, slot: Slot, event: Event) -> None:
        assert threading.current_thread() is not threading.main_thread()
        started[number].set()
        fill(number, slot, event)

    slots.fill = watched
    for number, _ in stage.backbone.layers_between(1, 4):
        following = number % 4 + 1
        assert started[following].wait(10), f"layer {following} is not read while layer {number} computes"
        started[number].clear()


def test_an_error_while_reading_ahead_is_raised_where_the_layer_is_used(
    saved_model: SavedModel, load_stage: LoadStage
) -> None:
    stage = load_stage(saved_model("llama3.1")[0], residency="disk")
    slots = stage.backbone.slots
    assert slots is not None and slots.fill is not None
    expected, fill, failing = layer_outputs(stage), slots.fill, [3]

    def broken(number: int, slot: Slot, event: Event) -> None:
        if number in failing:
            slot.memory.zero_()
            raise OSError("gone")
        fill(number, slot, event)

    slots.fill = broken
    reached = []
    with pytest.raises(OSError, match="gone"):
        for number, _ in stage.backbone.layers_between(1, 4):
            reached.append(number)
    assert reached == [1, 2]
    failing.clear()
    assert torch.equal(layer_outputs(stage)[0], expected[0])


@pytest.mark.parametrize(("residency", "slots"), [("host", 0), ("disk", 0), ("device", 1)])
def test_layers_are_freed_as_soon_as_they_are_unused(
    residency: str, slots: int, saved_model: SavedModel, load_stage: LoadStage
) -> None:
    """Otherwise host memory would hold the layers of validation beside those that are tuned."""
    stage = load_stage(saved_model("llama3.1")[0], EXITS, residency=residency, slots=slots)
    layer_outputs(stage)
    filled = stage.backbone.slots
    assert filled is not None
    for slot in filled.slots:
        if slot.filling is not None:
            slot.filling.wait()
    gc.disable()
    try:
        memory = [weakref.ref(slot.memory) for slot in filled.slots]
        found = weakref.ref(stage), weakref.ref(filled), *memory
        del stage, filled, slot
        for _ in range(100):  # the thread of the side stream drops its last work after it was waited for
            if all(each() is None for each in found):
                break
            time.sleep(0.01)
        assert [each() for each in found] == [None] * len(found)
    finally:
        gc.enable()


def test_events_are_recorded_only_in_the_steps_that_want_them(groups: Groups, saved_model: SavedModel) -> None:
    case = Case("events", "llama3.1", (ExitSpec(2, "mlp"),), (((1, 4), (2,)),), residency="disk")
    pipeline, optimizer = prepare(saved_model("llama3.1")[0], case, groups)
    found = []
    for wanted in (True, False, True):
        pipeline.events = [] if wanted else None
        tuning_step(pipeline, optimizer, random_batches(131, 0, 0, 1, 2), case.loss, 1.0)
        found.append([event.number for event in pipeline.events or () if event.kind == "layer"])
    assert found[0] == found[2] != [] and not found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("residency", ["host", "disk"])
def test_steps_on_a_gpu(residency: str, groups: Groups, saved_model: SavedModel) -> None:
    """Layers whose copy takes longer than their work: what is computed too early or too late would differ."""
    path, _ = saved_model("llama2", hidden_size=1024, intermediate_size=2816, num_hidden_layers=7)
    whole = (((1, 7), (3, 7)),)
    found = []
    for each in ("device", residency):
        exits = (ExitSpec(3, "mlp", "shared"), ExitSpec(7, "mlp", "shared"))
        case = Case("gpu", "llama2", exits, whole, dtype="bfloat16", residency=each)  # type: ignore[arg-type]
        pipeline, optimizer = prepare(path, case, groups)
        results = [
            tuning_step(pipeline, optimizer, random_batches(131, number, 0, 1, 1), case.loss, 1.0)
            for number in range(4)
        ]
        found.append((results, [parameter.detach().cpu() for parameter in pipeline.stage.exits[1].parameters()]))
    (expected, weights), (streamed, others) = found
    assert streamed == expected
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
