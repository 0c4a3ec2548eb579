"""Weights that stay packed in memory give the results of expanded ones, bit for bit, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee.checkpoint.packing import pack_layers, packed_slots
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.testing import quantised as recipes
from megatron_ee.testing.quantised import Recipe, save_quantised_model

TOKENS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(7))
RECIPES: dict[str, Callable[[], Recipe]] = {
    "gptq": lambda: recipes.gptq(act_order=True),
    "awq": lambda: recipes.awq(),
    "fp8": lambda: recipes.fp8(),
    "int4": lambda: recipes.compressed_tensors(
        "pack-quantized", torch.bfloat16, num_bits=4, strategy="group", group_size=16
    ),
    "int8": lambda: recipes.compressed_tensors("int-quantized", num_bits=8, strategy="channel", symmetric=False),
}


@torch.no_grad()
def logits(stage: Stage) -> Tensor:
    h, _ = stage.run_layers(stage.backbone.embed(TOKENS), stage.backbone.positions(TOKENS.shape[1]), to_end=True)
    return stage.final_logits(stage.final_features(h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name, family", [*((name, "llama3.1") for name in RECIPES), ("awq", "phi3"), ("int4", "qwen2")]
)
def test_packed_equals_expanded(name: str, family: str, dtype: torch.dtype, tmp_path: Path, load_stage: Any) -> None:
    save_quantised_model(family, tmp_path, RECIPES[name](), num_hidden_layers=3)
    exits = [ExitSpec(1), ExitSpec(2, "layer", "shared")]
    expanded, packed = (load_stage(tmp_path, exits, dtype=dtype, slots=slots) for slots in (0, 1))
    assert packed.backbone.slots is not None and len(packed.backbone.slots.slots) == 1
    for _ in range(2):  # the slot then holds the last layer, not the first
        assert torch.equal(logits(packed), logits(expanded))
    for ours, theirs in zip(packed.exits, expanded.exits, strict=True):  # copies are expanded, and of their own
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("residency", ["host", "disk"])
def test_streamed_equals_expanded(residency: str, tmp_path: Path, load_stage: Any) -> None:
    save_quantised_model("llama3.1", tmp_path, RECIPES["int4"](), num_hidden_layers=3)
    assert torch.equal(logits(load_stage(tmp_path, residency=residency)), logits(load_stage(tmp_path)))


@pytest.mark.parametrize("name, most", [("int4", 0.33), ("int8", 0.57)])
def test_bytes_in_memory(name: str, most: float, tmp_path: Path, load_stage: Any) -> None:
    save_quantised_model("llama3.1", tmp_path, RECIPES[name](), num_hidden_layers=2)
    stage = load_stage(tmp_path, dtype=torch.bfloat16, slots=1)
    layers = pack_layers(stage.backbone, open_model(tmp_path))
    slot = stage.backbone.slots.slots[0].memory.nbytes
    assert set(layers) == {1, 2}
    assert all(layer.nbytes <= most * slot for layer in layers.values())


def test_only_quantised_models_are_packed(tmp_path: Path, saved_model: Any) -> None:
    save_quantised_model("llama3.1", tmp_path, RECIPES["awq"](), num_hidden_layers=1)
    assert packed_slots(open_model(tmp_path), "packed") == 1
    assert packed_slots(open_model(tmp_path), "expanded") == 0
    assert packed_slots(open_model(saved_model("llama2")[0]), "packed") == 0
