"""Quantised releases: their weights' values, box by box, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ee.checkpoint.quantised.registry import METHODS
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.errors import CheckpointError
from megatron_ee.testing import quantised as recipes
from megatron_ee.testing.quantised import Recipe, save_quantised_model

DOWN = "model.layers.1.mlp.down_proj"
CASES: dict[str, Callable[[], Recipe]] = {
    "gptq": lambda: recipes.gptq(),
    "gptq-act-order": lambda: recipes.gptq(act_order=True),
    "gptq-8-bits-v2": lambda: recipes.gptq(8, version=2),
    "awq": lambda: recipes.awq(),
    "fp8-blocks": lambda: recipes.fp8(),
    "fp8-tensor": lambda: recipes.fp8(None),
    "ct-int4-groups": lambda: recipes.compressed_tensors("pack-quantized", num_bits=4, strategy="group", group_size=16),
    "ct-int4-asymmetric": lambda: recipes.compressed_tensors(
        "pack-quantized", torch.bfloat16, num_bits=4, strategy="group", group_size=16, symmetric=False
    ),
    "ct-int4-act-order": lambda: recipes.compressed_tensors(
        "pack-quantized", num_bits=4, strategy="group", group_size=16, act_order=True
    ),
    "ct-int8-channel": lambda: recipes.compressed_tensors("pack-quantized", num_bits=8, strategy="channel"),
    "ct-int8-asymmetric": lambda: recipes.compressed_tensors(
        "int-quantized", num_bits=8, strategy="channel", symmetric=False
    ),
    "ct-int8-groups": lambda: recipes.compressed_tensors(
        "naive-quantized", torch.float16, num_bits=8, strategy="group", group_size=16
    ),
    "ct-fp8-tensor": lambda: recipes.compressed_tensors("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "ct-fp8-channel": lambda: recipes.compressed_tensors(
        "float-quantized", torch.bfloat16, num_bits=8, type="float", strategy="channel"
    ),
    "ct-fp8-blocks": lambda: recipes.compressed_tensors(
        "naive-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 16]
    ),
}


@pytest.fixture
def release(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Writes a quantised tiny model; returns its directory and the model with the values that it stands for."""

    def write(name: str, family: str = "llama3.1", **changes: Any) -> tuple[Path, Any]:
        directory = tmp_path / name
        return directory, save_quantised_model(family, directory, CASES[name](), **{"num_hidden_layers": 2, **changes})

    return write


def read(tensor: Any, offset: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    tensor.read(out, offset)
    return out


@pytest.mark.parametrize("name", CASES)
def test_every_box_of_a_weight_has_the_values_that_the_method_defines(name: str, release: Any) -> None:
    path, reference = release(name, head=True, vocab_size=144)
    model = open_model(path)
    expected = reference.state_dict()
    quantised = [weight for weight in expected if weight.endswith("_proj.weight")]
    assert sorted(model.quantised) == sorted([*quantised, "lm_head.weight"])
    for weight in model.weights:
        whole = (
            read(model.weights[weight], (0, 0), tuple(expected[weight].shape), torch.float32)
            if (expected[weight].ndim == 2)
            else None
        )
        assert whole is None or torch.equal(whole, expected[weight]), weight
    down, values = model.weights[f"{DOWN}.weight"], expected[f"{DOWN}.weight"]  # [64, 112]
    for offset, shape in (((0, 56), (64, 56)), ((3, 5), (13, 30)), ((63, 111), (1, 1)), ((17, 0), (20, 112))):
        rows, columns = (slice(first, first + size) for first, size in zip(offset, shape, strict=True))
        assert torch.equal(read(down, offset, shape, torch.float32), values[rows, columns])
        assert torch.equal(read(down, offset, shape, torch.bfloat16), values[rows, columns].bfloat16())


def whole(path: Path, weight: str = f"{DOWN}.weight") -> Tensor:
    tensor = open_model(path).weights[weight]
    return read(tensor, (0, 0), (tensor.shape[0], tensor.shape[1]), torch.float32)


def test_zero_points_of_0_in_both_formats_of_gptq(release: Any) -> None:
    """In format gptq they borrow from the next zero point of their word."""
    path, _ = release("gptq")
    words = torch.tensor([0, 0x76543210, 0x10, -0x10000000], dtype=torch.int32).repeat(2)
    edit(path, lambda tensors: tensors.update({f"{DOWN}.qzeros": (words - 0x11111111).expand(7, 8)}))
    first = whole(path)
    edit(path, lambda tensors: tensors.update({f"{DOWN}.qzeros": words.expand(7, 8)}))
    edit_config(path, checkpoint_format="gptq_v2")
    assert torch.equal(first, whole(path))


def test_zero_points_of_a_symmetric_weight(release: Any) -> None:
    """Early releases and other tools than LLM Compressor store them; they are subtracted, as the library does."""
    path, reference = release("ct-int4-groups")
    edit(path, lambda tensors: tensors.update({f"{DOWN}.weight_zero_point": torch.zeros(64, 7, dtype=torch.int8)}))
    assert torch.equal(whole(path), reference.state_dict()[f"{DOWN}.weight"])
    edit(path, lambda tensors: tensors[f"{DOWN}.weight_zero_point"][1].fill_(2))
    scale = load_file(path / "model.safetensors")[f"{DOWN}.weight_scale"][1].repeat_interleave(16)
    expected = reference.state_dict()[f"{DOWN}.weight"][1] - 2 * scale
    torch.testing.assert_close(whole(path)[1], expected)


def test_zero_points_that_are_not_packed(release: Any) -> None:
    """As the library stored those of packed weights before April 2025."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    path, reference = release("ct-int4-asymmetric")
    name = f"{DOWN}.weight_zero_point"
    packed = load_file(path / "model.safetensors")[name]
    plain = unpack_from_int32(packed, 4, torch.Size((64, 7)), packed_dim=0)
    assert plain.dtype == torch.int8 and plain.unique().numel() > 2
    edit(path, lambda tensors: tensors.update({name: plain.contiguous()}))
    assert torch.equal(whole(path), reference.state_dict()[f"{DOWN}.weight"])
    edit(path, lambda tensors: tensors.update({name: plain[1:].contiguous()}))
    with pytest.raises(CheckpointError, match=r"weight_zero_point' has shape \[63, 7\]"):
        open_model(path)


def test_modules_with_settings_of_their_own(release: Any, tmp_path: Path) -> None:
    """Two groups of modules in different formats, and one module that is not quantised."""
    path, reference = release("ct-int4-groups")
    other = CASES["ct-int8-channel"]()
    weight = reference.state_dict()[f"{DOWN}.weight"]
    parts, values = other.quantise(weight)

    def mix(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith((f"{DOWN}.", "model.layers.0.mlp.up_proj."))]:
            del tensors[name]
        tensors.update({f"{DOWN}.{end}": part for end, part in parts.items()})
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(112, 64)

    edit(path, mix)
    assert f"{DOWN}.weight_packed" in refusal(path)
    first = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    second = {**other.config["config_groups"]["group_0"], "targets": ["re:.*down_proj$"]}
    groups = {"group_0": {**first, "format": "pack-quantized"}, "group_1": {**second, "format": "pack-quantized"}}
    edit_config(path, config_groups=groups, format="mixed-precision", ignore=["lm_head", "re:.*layers.0.mlp.up.*"])
    assert torch.equal(whole(path), values)
    assert "model.layers.0.mlp.up_proj.weight" not in open_model(path).quantised


def test_fp8_with_static_scales_of_activations_and_of_the_cache(release: Any) -> None:
    path, reference = release("fp8-tensor")

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            tensors[name.removesuffix("_inv")] = tensors.pop(name)
            tensors[name.replace("weight_scale_inv", "input_scale")] = torch.ones(())
        tensors["model.layers.0.self_attn.kv_scale"] = torch.ones(1)

    edit(path, rename)
    edit_config(path, activation_scheme="static", ignored_layers=["lm_head"], kv_cache_scheme="static")
    model = open_model(path)
    assert torch.equal(whole(path), reference.state_dict()[f"{DOWN}.weight"])
    assert model.quantises_activations and "model.layers.0.self_attn.kv_scale" in model.non_weights


def test_only_the_cache_is_quantised(saved_model: Any, tmp_path: Path) -> None:
    source, _ = saved_model("llama3.1")
    path = tmp_path / "model"
    shutil.copytree(source, path)
    edit(path, lambda tensors: tensors.update({"model.layers.0.self_attn.k_scale": torch.ones(1)}))
    config = json.loads((path / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    settings = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": scheme}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    model = open_model(path)
    assert not model.quantised and model.quantises_activations
    assert model.digest() == open_model(source).digest()


def test_the_values_do_not_depend_on_how_much_is_read_at_a_time(release: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reference = release("awq")
    monkeypatch.setattr("megatron_ee.checkpoint.quantised.weights.EXPANDED", 3 * 112)
    found = read(open_model(path).weights[f"{DOWN}.weight"], (0, 0), (64, 112), torch.float32)
    assert torch.equal(found, reference.state_dict()[f"{DOWN}.weight"])


def test_biases_of_zeros_that_the_family_lacks_are_carried_and_others_refused(release: Any) -> None:
    path, _ = release("gptq")
    edit(path, lambda tensors: tensors.update({f"{DOWN}.bias": torch.zeros(64)}))
    model = open_model(path)
    assert f"{DOWN}.bias" in model.non_weights and f"{DOWN}.bias" not in model.stored_weights
    edit(path, lambda tensors: tensors[f"{DOWN}.bias"].fill_(0.5))
    assert f"{DOWN}.bias" in refusal(path)


def test_the_hash_is_over_the_stored_tensors(release: Any) -> None:
    path, _ = release("gptq")
    before = open_model(path).digest()
    edit(path, lambda tensors: tensors.update({"model.layers.0.self_attn.k_scale": torch.ones(1)}) or None)
    edit(path, lambda tensors: tensors.pop("model.layers.0.self_attn.k_scale"))
    assert open_model(path).digest() == before
    edit(path, lambda tensors: tensors[f"{DOWN}.qweight"][0, :1].bitwise_xor_(1))
    assert open_model(path).digest() != before


def test_what_the_tensors_do_not_show_is_one_of_the_settings(release: Any) -> None:
    path, _ = release("gptq")
    first = open_model(path)
    edit_config(path, checkpoint_format="gptq_v2")
    second = open_model(path)
    assert first.digest() == second.digest()
    assert first.architecture.weight_format != second.architecture.weight_format


# ---------------------------------------------------------------------------------------------------- bad input


def edit(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(directory)
    text = str(caught.value)
    assert "\n" not in text and str(directory) in text
    return text


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("awq", {"quant_method": "bitsandbytes"}, ["quant_method", "'bitsandbytes'", *METHODS]),
        ("awq", {"quant_method": None}, ["quant_method", *METHODS]),
        ("awq", {"version": "gemv"}, ["version", "'gemv'", "gemm"]),
        ("awq", {"bits": 3}, ["bits 3", "4"]),
        ("awq", {"group_size": 0}, ["group_size", "from 1 to", "not 0"]),
        ("gptq", {"bits": 3}, ["bits 3", "4, 8"]),
        ("gptq", {"checkpoint_format": "marlin"}, ["checkpoint_format", "'marlin'", "gptq_v2"]),
        ("gptq", {"dynamic": [1]}, ["dynamic"]),
        ("gptq", {"desc_act": 1}, ["desc_act"]),
        ("fp8-blocks", {"weight_block_size": [32]}, ["weight_block_size", "[128, 128]"]),
        ("fp8-blocks", {"weight_block_size": [32, -1]}, ["weight_block_size", "from 1 to", "not -1"]),
        (
            "ct-int4-groups",
            {"config_groups": {"g": {"weights": {}, "format": "nvfp4-pack-quantized"}}},
            ["'nvfp4-pack-quantized'", "pack-quantized"],
        ),
        ("ct-int4-groups", {"transform_config": {"a": 1}}, ["transform_config"]),
        ("ct-int4-groups", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparsity_config"]),
        (
            "ct-int4-groups",
            {"config_groups": {"g": {"weights": {"num_bits": 3}}}},
            ["config_groups.g", "num_bits", "3"],
        ),
        ("ct-int4-groups", {"config_groups": {"g": {"weights": {"strategy": "token"}}}}, ["strategy", "'token'"]),
        ("ct-int4-groups", {"config_groups": {"W4A16": ["Linear"]}}, ["config_groups.W4A16", "object"]),
    ],
)
def test_settings_that_are_not_supported_are_named(
    name: str, changes: dict[str, Any], words: list[str], release: Any
) -> None:
    path, _ = release(name)
    edit_config(path, **changes)
    text = refusal(path)
    assert all(word in text for word in ["config.json", *words]), text


@pytest.mark.parametrize("name", ["gptq", "awq", "fp8-blocks", "ct-int4-groups"])
def test_quantised_tensors_that_config_does_not_describe(name: str, release: Any) -> None:
    """As in releases whose settings are in a file of their tool, such as hf_quant_config.json."""
    path, _ = release(name)
    if name.startswith("ct"):
        edit_config(path, config_groups={"group_0": {"weights": None}})
        assert "quantization_config" in refusal(path)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    text = refusal(path)
    assert all(word in text for word in ["model.layers.0.", "quantization_config", *METHODS]), text


@pytest.mark.parametrize(
    "name, end, change, words",
    [
        ("gptq", "qweight", lambda t: t[:-1], ["[13, 64]", "[14, 64]"]),
        ("gptq", "scales", lambda t: t[:-1], ["[6, 64]", "[7, 64]"]),
        ("gptq", "qweight", lambda t: t.float(), ["float32", "int32"]),
        ("gptq-act-order", "g_idx", None, ["missing"]),
        ("awq", "qzeros", None, ["missing"]),
        ("awq", "qweight", lambda t: t[:, :-1], ["[112, 7]", "[112, 8]"]),
        ("fp8-blocks", "weight_scale_inv", lambda t: t[:, :-1], ["[2, 3]", "[2, 4]"]),
        ("fp8-blocks", "weight_scale_inv", None, ["float8", "no scale"]),
        ("ct-int4-groups", "weight_packed", lambda t: t[:, :-1], ["[64, 13]", "[64, 14]"]),
        ("ct-int4-asymmetric", "weight_zero_point", None, ["missing"]),
        ("ct-int8-channel", "weight_scale", lambda t: t.int(), ["int32", "float32"]),
    ],
)
def test_tensors_that_do_not_fit(name: str, end: str, change: Any, words: list[str], release: Any) -> None:
    path, _ = release(name)
    tensor = f"{DOWN}.{end}"

    def spoil(tensors: dict[str, Tensor]) -> None:
        if change is None:
            del tensors[tensor]
        else:
            tensors[tensor] = change(tensors[tensor])

    edit(path, spoil)
    text = refusal(path)
    assert all(word in text for word in [DOWN, *words]), text


@pytest.mark.parametrize(
    "name, value",
    [
        *(("ct-int4-groups", value) for value in (0.0, float("nan"), float("inf"))),
        *(("ct-fp8-blocks", value) for value in (0.0, -0.5, float("nan"), -float("inf"))),
    ],
)
def test_scales_that_cannot_be(name: str, value: float, release: Any) -> None:
    path, _ = release(name)
    edit(path, lambda tensors: tensors[f"{DOWN}.weight_scale"][0, 3:4].fill_(value))
    weight = open_model(path).weights[f"{DOWN}.weight"]
    read(weight, (16, 0), (2, 112), torch.float32)  # others are read
    with pytest.raises(CheckpointError, match=f"{DOWN}.weight_scale.*scale of {value:g}"):
        read(weight, (0, 0), (64, 112), torch.float32)


@pytest.mark.parametrize("name, end", [("gptq", "scales"), ("awq", "scales"), ("ct-int4-asymmetric", "weight_scale")])
def test_scales_of_integers_may_be_negative(name: str, end: str, release: Any) -> None:
    """AutoRound chooses the sign of a symmetric group's scale, so that the larger extreme fits."""
    path, reference = release(name)
    edit(path, lambda tensors: tensors[f"{DOWN}.{end}"].neg_())
    found = read(open_model(path).weights[f"{DOWN}.weight"], (0, 0), (64, 112), torch.float32)
    assert torch.equal(found, -reference.state_dict()[f"{DOWN}.weight"])


def test_a_group_that_does_not_exist(release: Any) -> None:
    path, _ = release("gptq-act-order")
    edit(path, lambda tensors: tensors[f"{DOWN}.g_idx"][7:8].fill_(7))
    with pytest.raises(CheckpointError, match=f"{DOWN}.g_idx.*0 to 7, not 0 to 6"):
        read(open_model(path).weights[f"{DOWN}.weight"], (0, 0), (64, 112), torch.float32)
