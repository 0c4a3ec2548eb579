"""Conversion keeps quantised tensors as they are, in any layout, and expands them where that is asked or needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ee.checkpoint.adapter import open_adapter
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.schema import ExitConfig
from megatron_ee.conversion.convert import Conversion, prepare, write
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.testing import quantised as recipes
from megatron_ee.testing.quantised import Recipe, save_quantised_model

RECIPES: dict[str, Callable[[], Recipe]] = {
    "gptq": lambda: recipes.gptq(act_order=True),
    "awq": lambda: recipes.awq(),
    "fp8": lambda: recipes.fp8(),
    "fp8-tensor": lambda: recipes.fp8(None),
    "ct": lambda: recipes.compressed_tensors(
        "pack-quantized", torch.bfloat16, num_bits=4, strategy="group", group_size=16, symmetric=False
    ),
}


def convert(output: Path, **request: Any) -> Path:
    wanted = Conversion(**request)
    write(prepare(wanted)[1], wanted, output)
    return output


def described(directory: Path) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    tensors = load_file(directory / "model.safetensors")
    return {
        name: (each.dtype, list(each.shape), each.flatten().view(torch.uint8).numpy().tobytes())
        for name, each in tensors.items()
    }


@pytest.mark.parametrize("family", ["llama3.1", "phi3"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_round_trip_through_a_sharded_checkpoint_is_byte_identical(name: str, family: str, tmp_path: Path) -> None:
    reference = save_quantised_model(family, tmp_path / "hf", RECIPES[name](), num_hidden_layers=2)
    parallel = convert(tmp_path / "parallel", input=tmp_path / "hf", to="parallel", tensor=2, pipeline=2)
    back = convert(tmp_path / "back", input=parallel, to="hf")
    assert described(tmp_path / "hf") == described(back)
    assert (back / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    assert len({open_model(tmp_path / place).digest() for place in ("hf", "parallel", "back")}) == 1
    model = open_model(parallel)
    for weight, values in reference.state_dict().items():
        found = torch.empty(values.shape)
        model.weights[weight].read(found, (0,) * found.ndim)
        assert torch.equal(found, values), weight
    second = [name for file in parallel.glob("shard-p00-t01-*") for name in load_file(file)]
    assert any(name.startswith("model.layers.0.mlp.down_proj.") for name in second), "quantised tensors are cut too"


def test_expanded_weights_are_a_plain_model_and_its_exits_fit_it(tmp_path: Path) -> None:
    reference = save_quantised_model("llama3.1", tmp_path / "hf", RECIPES["ct"](), num_hidden_layers=2)
    with_exits = convert(tmp_path / "exits", input=tmp_path / "hf", to="hf", add=[ExitConfig(1)])
    assert open_adapter(with_exits).backbone_sha256 == open_model(tmp_path / "hf").digest()
    plain = convert(tmp_path / "plain", input=with_exits, to="hf", expand=True)
    model, tensors = open_model(plain), load_file(plain / "model.safetensors")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text()) and not model.quantised
    assert all(torch.equal(tensors[name], values) for name, values in reference.state_dict().items())
    adapter = open_adapter(plain)
    assert adapter.backbone_sha256 == model.digest() != open_model(with_exits).digest()
    exits = load_file(plain / "adapter" / "exits.safetensors")
    assert torch.equal(exits["exits.1.mlp.down_proj.weight"], tensors["model.layers.0.mlp.down_proj.weight"])


def test_an_exported_exit_is_expanded(tmp_path: Path) -> None:
    reference = save_quantised_model("llama3.1", tmp_path / "hf", RECIPES["awq"](), num_hidden_layers=2)
    small = Conversion(input=tmp_path / "hf", to="hf", add=[ExitConfig(1, head="shared")], exit=1)
    contents = prepare(small)[1]
    assert any("expanded" in note for note in contents.notes)
    write(contents, small, tmp_path / "small")
    model, values = open_model(tmp_path / "small"), load_file(tmp_path / "small" / "model.safetensors")
    assert model.architecture.num_layers == 1 and not model.quantised
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(values[up], reference.state_dict()[up])


def test_what_cannot_hold_them_is_refused(tmp_path: Path) -> None:
    save_quantised_model("llama2", tmp_path / "hf", RECIPES["awq"](), num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="--expand"):
        prepare(Conversion(input=tmp_path / "hf", to="megatron"))
    prepare(Conversion(input=tmp_path / "hf", to="megatron", expand=True))
    with pytest.raises(ConfigError, match="--expand"):
        prepare(Conversion(input=tmp_path / "hf", to="adapter", expand=True))
