"""The traversal of layers: it stops at taps, goes on from each of them, and takes layers from any source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.model.layer import DecoderLayer
from megatron_ee.model.traversal import run_layers, run_segment

LAST = 4


@pytest.fixture
def stage(saved_model: Any, load_stage: Any) -> Stage:
    return load_stage(saved_model("llama3.1")[0], [ExitSpec(1, "norm"), ExitSpec(2, "mlp"), ExitSpec(LAST, "mlp")])


def traverse(stage: Stage, start: int, x: Tensor, *, to_hidden: bool) -> tuple[Tensor, dict[int, Tensor]]:
    """From a depth to the last one, and what was found at each tap."""
    positions, found = stage.backbone.positions(len(x)), {}

    def run(first: int, last: int, x: Tensor) -> Tensor:
        return run_segment(stage.backbone.layers_between, stage.taps, first, last, x, positions)

    def at_tap(layer: int, tap: Tensor) -> Tensor:
        found[layer] = tap
        return tap

    return run_layers(run, stage.taps, start, LAST, x, at_tap, to_hidden=to_hidden), found


@torch.no_grad()
def test_it_goes_on_from_every_tap(stage: Stage, tokens: Tensor) -> None:
    embedded = stage.backbone.embed(tokens.to(platform.device()))
    h, taps = traverse(stage, 0, embedded, to_hidden=True)
    assert list(taps) == [1, 2, LAST]
    for depth, tap in taps.items():
        again, later = traverse(stage, depth, tap, to_hidden=True)
        assert torch.equal(again, h) and list(later) == [layer for layer in taps if layer > depth]
        at_end, _ = traverse(stage, depth, tap, to_hidden=False)
        assert torch.equal(at_end, taps[LAST]), "the tap of an mlp exit is the residual"
    assert not torch.equal(h, taps[LAST])


@torch.no_grad()
def test_a_source_holds_one_layer_at_a_time(stage: Stage, tokens: Tensor) -> None:
    """As one that fetches weights does: a layer is done with when the next one is asked for."""
    live: list[int] = []

    def source(first: int, last: int) -> Iterator[tuple[int, DecoderLayer]]:
        for number, layer in stage.backbone.layers_between(first, last):
            live.append(number)
            yield number, layer
            live.remove(number)

    def check(number: int) -> None:
        assert live == [number]
        ran.append(number)

    ran: list[int] = []
    for number, layer in stage.backbone.numbered_layers():
        layer.mlp.register_forward_hook(lambda *_, number=number: check(number))
    embedded = stage.backbone.embed(tokens.to(platform.device()))
    positions = stage.backbone.positions(len(embedded))
    whole = run_segment(source, {}, 0, LAST, embedded, positions)
    assert ran == [1, 2, 3, LAST]
    r = run_segment(source, stage.taps, 0, 2, embedded, positions)
    assert torch.equal(run_segment(source, {2: "residual"}, 2, LAST, r, positions), whole)
