"""An exit as a plain model: the right tensor in every place, none of them read, and a config.json that fits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.exits import ExitSpec
from megatron_ee.conversion.shallow import shallow_config, shallow_model
from megatron_ee.errors import CheckpointError
from megatron_ee.exits.tensors import exit_tensors
from megatron_ee.families.registry import parse_architecture
from megatron_ee.families.weights import expected_tensors

CONFIG: dict[str, Any] = {
    "vocab_size": 300,
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "eos_token_id": [1, 2, 3, 4],
    "dtype": "bfloat16",
}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 16}
EXITS = (
    ExitSpec(1, "norm", "shared"),
    ExitSpec(2, "mlp", "own"),
    ExitSpec(3, "layer", "low_rank", rank=8),
    ExitSpec(4, "embedding", "own"),
)


def in_memory(value: Tensor, name: str) -> StoredTensor:
    """A tensor as if it were in a file named after it."""

    def read(out: Tensor, offset: Sequence[int]) -> None:
        box = tuple(slice(first, first + extent) for first, extent in zip(offset, out.shape, strict=True))
        out.copy_(value[box])

    return StoredTensor(value.dtype, tuple(value.shape), read, (Path(name),))


def unreadable(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> StoredTensor:
    def read(out: Tensor, offset: Sequence[int]) -> None:
        raise AssertionError(f"{name} was read")

    return StoredTensor(dtype, shape, read, (Path(name),))


def make_contents(
    config: dict[str, Any] | None = None,
    exits: tuple[ExitSpec, ...] = EXITS,
    dtype: torch.dtype = torch.bfloat16,
    exit_dtype: torch.dtype = torch.bfloat16,
    values: bool = False,
) -> Contents:
    config = {**CONFIG, **(config or {})}
    arch = parse_architecture(config)
    generator = torch.Generator().manual_seed(0)

    def tensor(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> StoredTensor:
        if not values:
            return unreadable(shape, dtype, name)
        return in_memory(torch.randn(shape, generator=generator).to(dtype), name)

    own = {name: shape for spec in exits for name, (shape, _) in exit_tensors(spec, arch).items()}
    return Contents(
        source=Path("models/base"),
        format="Hugging Face model",
        architecture=arch,
        backbone={name: tensor(shape, dtype, name) for name, shape in expected_tensors(arch).items()},
        non_weights={"model.layers.3.self_attn.rotary_emb.inv_freq": unreadable((6,), torch.float32, "inv_freq")},
        exits=exits,
        exit_tensors={name: tensor(shape, exit_dtype, name) for name, shape in own.items()},
        assets={
            "config.json": json.dumps(config).encode(),
            "generation_config.json": Path("models/base/generation_config.json"),
            "tokenizer.json": b"{}",
        },
        base_model="models/base",
        backbone_sha256="ab" * 32,
        steps=7,
    )


def whole(tensor: StoredTensor, dtype: torch.dtype | None = None) -> Tensor:
    out = torch.full(tensor.shape, torch.nan, dtype=dtype or tensor.dtype)
    tensor.read(out, (0,) * len(tensor.shape))
    return out


def config_of(contents: Contents) -> dict[str, Any]:
    content = contents.assets["config.json"]
    assert isinstance(content, bytes)
    result: dict[str, Any] = json.loads(content)
    return result


def origins(contents: Contents) -> dict[str, tuple[str, ...]]:
    """Name in the model -> names of the tensors that it is made of, where they are others."""
    made = {name: tuple(str(file) for file in tensor.files) for name, tensor in contents.backbone.items()}
    return {name: files for name, files in made.items() if files != (name,)}


def refusal(contents: Contents, layer: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        shallow_model(contents, layer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ tensors


def test_every_tensor_comes_from_its_place() -> None:
    contents = make_contents()  # none of its tensors can be read
    norm, mlp, layer = (shallow_model(contents, number) for number in (1, 2, 3))
    assert origins(norm) == {"model.norm.weight": ("exits.1.norm.weight",)}
    assert origins(mlp) == {
        "model.layers.1.mlp.gate_proj.weight": ("exits.2.mlp.gate_proj.weight",),
        "model.layers.1.mlp.up_proj.weight": ("exits.2.mlp.up_proj.weight",),
        "model.layers.1.mlp.down_proj.weight": ("exits.2.mlp.down_proj.weight",),
        "model.norm.weight": ("exits.2.norm.weight",),
        "lm_head.weight": ("exits.2.lm_head.weight",),
    }
    inner = [name.removeprefix("model.layers.0.") for name in contents.backbone if ".layers.0." in name]
    assert origins(layer) == {
        **{f"model.layers.3.{name}": (f"exits.3.{name}",) for name in inner},
        "model.norm.weight": ("exits.3.norm.weight",),
        "lm_head.weight": ("lm_head.weight", "exits.3.lm_head.b", "exits.3.lm_head.a"),
    }
    for made, depth in ((norm, 1), (mlp, 2), (layer, 4)):
        assert made.architecture is not None and made.architecture.num_layers == depth
        expected = expected_tensors(made.architecture)
        assert {name: tensor.shape for name, tensor in made.backbone.items()} == expected
        assert {tensor.dtype for tensor in made.backbone.values()} == {torch.bfloat16}
        assert made.exits == () and not made.exit_tensors and not made.non_weights and made.backbone_sha256 is None


@pytest.mark.parametrize(
    "spec, tied, head",
    [
        (ExitSpec(2, "norm", "shared"), True, None),
        (ExitSpec(2, "norm", "own"), False, ("exits.2.lm_head.weight",)),
        (
            ExitSpec(2, "norm", "low_rank"),
            False,
            ("model.embed_tokens.weight", "exits.2.lm_head.b", "exits.2.lm_head.a"),
        ),
    ],
)
def test_the_head_of_a_tied_model(spec: ExitSpec, tied: bool, head: tuple[str, ...] | None) -> None:
    made = shallow_model(make_contents({"tie_word_embeddings": True}, (spec,)), 2)
    assert config_of(made)["tie_word_embeddings"] is tied
    assert origins(made).get("lm_head.weight") == head
    assert ("lm_head.weight" in made.backbone) is not tied
    assert origins(made)["model.norm.weight"] == ("exits.2.norm.weight",)


def test_what_differs_says_so_where_files_do_not() -> None:
    """Exits share a file: what is kept of a conversion, or of a hash, must not pass for another exit's."""
    contents = make_contents(exits=tuple(ExitSpec(n, "norm", "low_rank") for n in (1, 2, 3)))
    file = (Path("exits.safetensors"),)
    shared = {name: dataclasses.replace(tensor, files=file) for name, tensor in contents.exit_tensors.items()}
    contents = dataclasses.replace(contents, exit_tensors=shared)
    models = [shallow_model(contents, layer) for layer in (1, 2, 3)]
    for name in ("model.norm.weight", "lm_head.weight"):
        assert len({model.backbone[name].files for model in models}) == 1
        assert len({model.backbone[name].made for model in models}) == 3
    assert models[0].backbone["model.embed_tokens.weight"] is contents.backbone["model.embed_tokens.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_head_is_multiplied_out(dtype: torch.dtype) -> None:
    contents = make_contents(dtype=dtype, exit_dtype=torch.bfloat16, values=True)
    head = shallow_model(contents, 3).backbone["lm_head.weight"]
    assert head.dtype == dtype and head.shape == (300, 48)
    w0, a, b = (
        whole(tensor, torch.float64)
        for tensor in (
            contents.backbone["lm_head.weight"],
            contents.exit_tensors["exits.3.lm_head.a"],
            contents.exit_tensors["exits.3.lm_head.b"],
        )
    )
    exact = w0 + b @ a
    step = torch.finfo(dtype).eps * exact.abs()
    assert ((whole(head).double() - exact).abs() <= step * 0.51 + 1e-5 * (dtype == torch.float32)).all()
    assert (exact - w0).abs().max() > 1  # the product is most of it
    assert torch.equal(whole(head, torch.float64), whole(head).double())  # rounded for every reader


def test_a_low_rank_head_is_the_same_however_it_is_read() -> None:
    config = {"vocab_size": 777, "hidden_size": 96}
    contents = make_contents(config, (ExitSpec(2, "norm", "low_rank", rank=61),), torch.float32, values=True)
    head = shallow_model(contents, 2).backbone["lm_head.weight"]
    expected = whole(head)
    assert expected.isfinite().all()
    for first, last, left, right in ((0, 1, 0, 96), (5, 131, 0, 96), (128, 256, 3, 7), (776, 777, 50, 96)):
        box = torch.full((last - first, right - left), torch.nan)
        head.read(box, (first, left))
        assert torch.equal(box, expected[first:last, left:right])
    slanted = torch.full((96, 777), torch.nan).T
    head.read(slanted, (0, 0))
    assert torch.equal(slanted, expected)
    assert torch.equal(torch.cat([slab.clone() for slab in head.slabs()]), expected)


@pytest.mark.parametrize("piece", [None, 1000])
def test_exits_of_another_dtype_are_rounded_to_the_backbones(
    piece: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if piece:  # as for tensors of many MiB, a few rows at a time
        monkeypatch.setattr("megatron_ee.conversion.shallow.PIECE", piece)
    contents = make_contents(dtype=torch.bfloat16, exit_dtype=torch.float32, values=True)
    made = shallow_model(contents, 2)
    line = "models/base: the exit after layer 2 is rounded from float32 to bfloat16, the dtype of the model that it"
    assert [note.startswith(line) for note in made.notes] == [True]
    assert shallow_model(make_contents(dtype=torch.float32), 2).notes == ()  # a wider dtype rounds nothing
    for name, (origin,) in origins(made).items():
        tensor, exact = made.backbone[name], whole(contents.exit_tensors[origin])
        assert tensor.dtype == torch.bfloat16 and exact.dtype == torch.float32
        rounded = exact.bfloat16()
        assert torch.equal(whole(tensor), rounded)
        # Whoever reads it as float32 has the same values.
        assert torch.equal(whole(tensor, torch.float32), rounded.float()) and not torch.equal(rounded.float(), exact)
    head = made.backbone["lm_head.weight"]
    box = torch.empty(7, 5, dtype=torch.float32)
    head.read(box, (100, 11))
    assert torch.equal(box, whole(head)[100:107, 11:16].float())


# ------------------------------------------------------------------------------------------------------- config


def test_only_what_depends_on_the_layers_changes() -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    config = {
        "rope_theta": 5e5,
        "rope_scaling": rope,
        "layer_types": ["full_attention"] * 4,
        "tie_word_embeddings": False,
        "layer_scales": [1.5, 2.5, 3.5, 4.5],
        "mixed": [1, 2, 3],
    }
    contents = make_contents(config)
    before, after = config_of(contents), config_of(shallow_model(contents, 3))
    assert list(after) == list(before)
    assert after == before | {"layer_scales": [1.5, 2.5, 3.5, 4.5], "num_hidden_layers": 4}
    after = config_of(shallow_model(contents, 2))
    assert list(after) == list(before)
    changed = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "layer_scales": [1.5, 2.5]}
    assert after == before | changed
    made = shallow_model(contents, 2)
    assert {**made.assets, "config.json": None} == {**contents.assets, "config.json": None}


def test_auto_map_goes_with_the_code_that_it_names() -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    contents = make_contents({"architectures": ["Phi3ForCausalLM"], "auto_map": auto_map})
    before, after = config_of(contents), config_of(shallow_model(contents, 2))
    assert before.pop("auto_map") and after == before | {"num_hidden_layers": 2, "tie_word_embeddings": False}


def test_a_layer_exit_is_of_the_last_layers_kind() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    for last in ("sliding_attention", "full_attention"):
        config = {**CONFIG, **QWEN, "layer_types": [*kinds[:3], last]}
        arch = parse_architecture(config)
        for layer in (1, 2, 3, 4):
            changed = shallow_config(config, arch, ExitSpec(layer, "layer"))
            assert changed["layer_types"] == config["layer_types"][:layer] + [last]
            assert "max_window_layers" not in changed


@pytest.mark.parametrize("body", ["norm", "mlp", "layer"])
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("first", [None, 0, 1, 2, 3, 4, 9])
def test_windows_without_layer_types(first: int | None, layer: int, body: Any) -> None:
    config = {**CONFIG, **QWEN, **({} if first is None else {"max_window_layers": first})}
    arch = parse_architecture(config)
    changed = shallow_config(config, arch, ExitSpec(layer, body))
    added = arch.windows[-1:] if body == "layer" else ()
    assert parse_architecture(changed).windows == arch.windows[:layer] + added


@pytest.mark.parametrize("changes", [{"use_sliding_window": False}, {"architectures": ["MistralForCausalLM"]}])
def test_windows_that_no_number_decides(changes: dict[str, Any]) -> None:
    config = {**CONFIG, **QWEN, "max_window_layers": 2, **changes}
    changed = shallow_config(config, parse_architecture(config), ExitSpec(1, "layer"))
    assert changed["max_window_layers"] == 2


def test_lists_of_one_are_not_taken_for_lists_of_layers() -> None:
    contents = make_contents({"num_hidden_layers": 1, "eos_token_id": [2]}, (ExitSpec(1, "layer"),))
    config = config_of(shallow_model(contents, 1))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["eos_token_id"] == [2]
    assert config["num_hidden_layers"] == 2


def test_config_as_a_file(tmp_path: Path) -> None:
    contents = make_contents()
    path = tmp_path / "config.json"
    path.write_bytes(contents.assets["config.json"])  # type: ignore[arg-type]
    from_file = dataclasses.replace(contents, assets={**contents.assets, "config.json": path})
    assert config_of(shallow_model(from_file, 2)) == config_of(shallow_model(contents, 2))


# ----------------------------------------------------------------------------------------------------- refusals


def test_refusals() -> None:
    contents = make_contents()
    text = refusal(contents, 5)
    assert "models/base" in text and "layer 5" in text and "1, 2, 3, 4" in text
    text = refusal(contents, 4)
    assert "embedding" in text and "RMSNorm before the head" in text
    assert "no exits" in refusal(dataclasses.replace(contents, exits=(), exit_tensors={}), 2)
    assert "backbone" in refusal(dataclasses.replace(contents, architecture=None, backbone={}), 2)
    assets = {name: asset for name, asset in contents.assets.items() if name != "config.json"}
    assert "config.json is missing" in refusal(dataclasses.replace(contents, assets=assets), 2)
    damaged = dataclasses.replace(contents, assets={**assets, "config.json": b"[]"})
    assert "JSON object" in refusal(damaged, 2)


@pytest.mark.parametrize("name", ["exits.3.lm_head.b", "exits.3.self_attn.q_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("shape", [None, (3, 5)])
def test_tensors_that_are_missing_or_of_another_shape(name: str, shape: tuple[int, ...] | None) -> None:
    contents = make_contents()
    key = "exit_tensors" if name.startswith("exits.") else "backbone"
    tensors = dict(getattr(contents, key))
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = dataclasses.replace(tensors[name], shape=shape)
    text = refusal(dataclasses.replace(contents, **{key: tensors}), 3)
    assert repr(name) in text and ("missing" in text if shape is None else "[3, 5]" in text)
