"""A plain model is quantised while it is loaded: as the package does it, alike on every rank, with its own hash."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import open_model, quantise_layers
from megatron_ee.errors import ConfigError
from megatron_ee.exits.stage import Stage
from megatron_ee.model.setup import build_setup
from megatron_ee.testing import quantised as recipes
from megatron_ee.testing.quantised import save_quantised_model

DOWN = "model.layers.1.mlp.down_proj.weight"
SHAPE = {"intermediate_size": 96, "num_hidden_layers": 2}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "strategy": "channel"},
    "int4": {"num_bits": 4, "strategy": "group", "group_size": 32},
}


def read(tensor: Any, offset: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    out = torch.empty(shape)
    tensor.read(out, offset)
    return out


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_values_are_those_of_the_package_in_every_box(kind: Any, saved_model: Any) -> None:
    path, reference = saved_model("llama3.1", **SHAPE)
    plain = open_model(path)
    model = quantise_layers(plain, kind, "model.quantise")
    assert model.digest() == plain.digest() and len(model.quantised) == 14
    weight = reference.state_dict()[DOWN]
    _, values = recipes.compressed_tensors("pack-quantized", **ARGUMENTS[kind]).quantise(weight)
    assert not torch.equal(values, weight)
    found = model.weights[DOWN]
    assert torch.equal(read(found, (0, 0), (64, 96)), values)
    for offset, shape in (((0, 48), (64, 48)), ((5, 7), (9, 40)), ((63, 95), (1, 1))):
        rows, columns = (slice(first, first + size) for first, size in zip(offset, shape, strict=True))
        assert torch.equal(read(found, offset, shape), values[rows, columns]), "a cut group has its own scale"
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert model.weights[name] is plain.weights[name]


def test_the_largest_group_that_fits(saved_model: Any) -> None:
    model = quantise_layers(open_model(saved_model("llama3.1", **SHAPE)[0]), "int4", "model.quantise")
    assert model.quantised[DOWN].format.text.endswith("groups of 32")
    assert model.quantised["model.layers.1.mlp.up_proj.weight"].format.text.endswith("groups of 64")


def test_packed_equals_expanded(saved_model: Any, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ee.checkpoint.quantised.rounding.ROUNDED", 5 * 96)  # some rows at a time
    plain = open_model(saved_model("llama3.1", **SHAPE)[0])
    tokens, found = torch.arange(20)[None], []
    for model, slots in ((plain, 0), (quantise_layers(plain, "int4", "model.quantise"), 0), (None, 1)):
        model = model or quantise_layers(plain, "int4", "model.quantise")
        setup = build_setup(model.architecture, torch.float32, groups, slots=slots)
        stage = Stage(setup, range(1, 3), (), final_exit=True)
        load_backbone(stage, model)
        h, positions = stage.backbone.embed(tokens), stage.backbone.positions(20)
        found.append(stage.run_layers(h, positions, to_end=True)[0])
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


def test_what_cannot_be_quantised(saved_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = open_model(saved_model("llama3.1")[0])  # 112 features
    with pytest.raises(ConfigError, match="model.quantise: int4 needs groups of 128, 64, 32 .* 112 .*down_proj"):
        quantise_layers(odd, "int4", "model.quantise")
    quantise_layers(odd, "int8", "model.quantise")
    save_quantised_model("llama3.1", tmp_path, recipes.awq(), num_hidden_layers=1)
    with pytest.raises(ConfigError, match="--quantise: .* quantised already"):
        quantise_layers(open_model(tmp_path), "int8", "--quantise")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-ee\[quantised\]'"):
        quantise_layers(odd, "int8", "model.quantise")
