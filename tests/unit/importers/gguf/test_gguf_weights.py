"""Models in GGUF files, of every architecture: what is converted computes what transformers makes of the same file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.commands.main import main
from megatron_ee.conversion.formats import open_contents
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.families.registry import read_architecture
from megatron_ee.testing.gguf_files import BF16, F32, add_tokens, add_value, finish, model_tensors, write_model
from megatron_ee.testing.models import LINEAR, LONGROPE, PLAIN, tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}
TOKENS = torch.randint(3, 131, (2, 100), generator=torch.Generator().manual_seed(0))


def llama3_factors(size: int) -> np.ndarray:
    """``rope_freqs.weight`` as llama.cpp's converter computes it."""
    factors = []
    for index in range(size // 2):
        wavelength = 2 * math.pi * LLAMA3["rope_theta"] ** (2 * index / size)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / 1.0:
            factors.append(LLAMA3["factor"])
        else:
            factors.append(1 / ((1 - smooth) / LLAMA3["factor"] + smooth))
    assert any(1 < factor < 32 for factor in factors), "one frequency must be scaled in part"
    return np.array(factors, np.float32)


# A case: family of the tiny model with its changes, the file's architecture and metadata, and what transformers must be
# told because it does not read it from a file.
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama2", {}, "llama", {}, {}),
    "llama-3": (
        "llama2",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 32},
        "llama",
        {"rope__freq_base": 500_000.0},
        {"rope_parameters": LLAMA3, "head_dim": 32},
    ),
    "llama-biases": (
        "llama-biases",
        {},
        "llama",
        {"rope__scaling__type": "none", "expert_count": 0},
        {"attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", {"sliding_window": None}, "llama", {}, {}),
    "qwen2": ("qwen2", {}, "qwen2", {}, {}),
    "qwen2-yarn": (
        "qwen2",
        {"rope_parameters": YARN},
        "qwen2",
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32},
        {"rope_parameters": YARN},
    ),
    "qwen3": ("qwen3", {}, "qwen3", {}, {"head_dim": 32}),
    "gemma-2": (
        "gemma2",
        GEMMA,
        "gemma2",
        {
            "attention__sliding_window": 16,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
        },
        {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "gemma-3": (
        "gemma3",
        {**GEMMA, "layer_types": None, "num_hidden_layers": 7},
        "gemma3",
        {
            "attention__sliding_window": 16,
            "rope__freq_base": 50_000.0,
            "rope__scaling__type": "linear",
            "rope__scaling__factor": 4.0,
        },
        {"query_pre_attn_scalar": 32, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}},
    ),
    "phi-3": ("phi3", {}, "phi3", {"attention__sliding_window": 16}, {"sliding_window": 16, "pad_token_id": 0}),
    "phi-4-mini": (
        "phi4-mini",
        {},
        "phi3",
        {
            "rope__dimension_count": 12,
            "rope__scaling__original_context_length": 96,
            "rope__scaling__attn_factor": math.sqrt(1 + math.log(128 / 96) / math.log(96)),
            "attention__sliding_window": 0,
        },
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 96,
            "pad_token_id": 0,
        },
    ),
}
EXTRA = {
    "llama-3": {"rope_freqs.weight": llama3_factors(32)},
    "phi-4-mini": {
        "rope_factors_short.weight": np.array(LONGROPE["short_factor"], np.float32),
        "rope_factors_long.weight": np.array(LONGROPE["long_factor"], np.float32),
    },
}
STORED = {
    "llama": Type.Q4_1,
    "llama-3": Type.Q8_0,
    "llama-biases": F32,
    "mistral": Type.Q4_0,
    "qwen2": Type.Q5_0,
    "qwen2-yarn": Type.F16,
    "qwen3": BF16,
    "gemma-2": Type.Q5_1,
    "gemma-3": Type.Q8_0,
    "phi-3": Type.Q4_0,
    "phi-4-mini": Type.Q8_0,
}


def write_case(path: Path, name: str, stored: Type) -> Any:
    """Write the file of a case, and return the model that it was made of."""
    family, changes, arch, keys, _ = CASES[name]
    model = tiny_model(family, **{"intermediate_size": 128, **changes})  # whole blocks of 32
    embedding = Type.Q8_0 if stored in (Type.Q4_0, Type.Q4_1) else None
    write_model(path, model, arch, quantised=stored, embedding=embedding, extra=EXTRA.get(name), **keys)
    return model


def convert(path: Path, output: Path, *options: str) -> Path:
    assert main(["convert", "--input", str(path), "--output", str(output), "--to", "hf", *options]) == 0
    return output


def load(path: Path, file: str | None = None, **settings: Any) -> Any:
    """transformers' model in a directory, or in a GGUF file of it."""
    return AutoModelForCausalLM.from_pretrained(
        path, gguf_file=file, dtype=torch.float32, attn_implementation="eager", **settings
    ).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(TOKENS).logits
    return result


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers_reading_the_file(name: str, tmp_path: Path) -> None:
    write_case(tmp_path / "model.gguf", name, STORED[name])
    expected = load(tmp_path, "model.gguf", **CASES[name][4])
    output = convert(tmp_path / "model.gguf", tmp_path / "hf", "--dtype", "float32")
    found = load(output)
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=1e-4)
    opened = open_model(output)
    assert {tensor.dtype for tensor in opened.weights.values()} == {torch.float32}
    assert load_tokenizer(output).eos_id == 2


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_float32_gives_the_model_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    """This covers what transformers does not read from GGUF files: windows, soft caps, scaling of rotary positions."""
    model = write_case(tmp_path / "model.gguf", name, F32)
    output = convert(tmp_path / "model.gguf", tmp_path / "hf", "--dtype", "float32")
    torch.testing.assert_close(logits(load(output)), logits(model), rtol=0, atol=1e-4)
    state, saved = model.state_dict(), load_file(output / "model.safetensors")
    assert {*saved, *(["lm_head.weight"] if model.config.tie_word_embeddings else [])} == set(state)
    for key, tensor in saved.items():  # Gemma's norms lose the digits that 1 + w has no room for
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=2e-7 if name.startswith("gemma") else 0)


def test_bfloat16_is_the_default_and_rounds_the_dequantised_values(tmp_path: Path) -> None:
    write_case(tmp_path / "model.gguf", "llama", Type.Q4_1)
    wide = load_file(convert(tmp_path / "model.gguf", tmp_path / "wide", "--dtype", "float32") / "model.safetensors")
    narrow = load_file(convert(tmp_path / "model.gguf", tmp_path / "narrow") / "model.safetensors")
    assert wide.keys() == narrow.keys()
    assert all(torch.equal(narrow[name], wide[name].to(torch.bfloat16)) for name in wide)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_k_quants_and_more_rows_than_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 256, and reading in parts that begin and end inside heads."""
    monkeypatch.setattr("megatron_ee.importers.gguf.weights.VALUES", 3 * 256)
    model = tiny_model("llama2", hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=2)
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": 256,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 64,
    }.items():
        add_value(writer, f"llama.{key}", value)
    add_tokens(writer, 131)
    kinds = {2: Type.Q4_K, 1: Type.Q6_K, 0: Type.Q3_K}
    for number, (name, data) in enumerate(model_tensors(model, "llama").items()):
        if data.ndim == 1:
            writer.add_tensor(name, data)
            continue
        kind = kinds[number % 3]
        blocks = random.integers(0, 256, (len(data), gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        scales = {Type.Q4_K: (0, 2), Type.Q6_K: (208,), Type.Q3_K: (108,)}[kind]
        for scale in scales:
            blocks[:, scale : scale + 2] = np.full(len(data), 0.002, np.float16).view(np.uint8).reshape(-1, 2)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    finish(writer)
    found = load(convert(tmp_path / "model.gguf", tmp_path / "hf", "--dtype", "float32"))
    expected = load(tmp_path, "model.gguf")
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=1e-4)


def test_every_box_of_a_weight_is_the_same(tmp_path: Path) -> None:
    """Tensor-parallel ranks read parts of rows and columns, and of biases."""
    write_case(tmp_path / "model.gguf", "llama-biases", Type.F16)
    for name, tensor in open_contents(tmp_path / "model.gguf").backbone.items():
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        tensor.read(whole, (0,) * whole.dim())
        offset = tuple(size // 3 for size in whole.shape)
        part = torch.empty([size - start - 1 for size, start in zip(whole.shape, offset, strict=True)])
        tensor.read(part, offset)
        expected = whole[tuple(slice(start, -1) for start in offset)]
        assert torch.equal(part.to(tensor.dtype), expected), name


def test_a_window_makes_it_a_mistral(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    write_model(tmp_path / "model.gguf", model, "llama", attention__sliding_window=16)
    output = convert(tmp_path / "model.gguf", tmp_path / "hf", "--dtype", "float32")
    assert read_architecture(output).family == "mistral"
    torch.testing.assert_close(logits(load(output)), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("layers", "arch", "scale"), [(46, "gemma2", 16), (62, "gemma3", 16), (4, "gemma3", 32)])
def test_the_attention_scale_of_the_largest_gemmas(layers: int, arch: str, scale: int, tmp_path: Path) -> None:
    """The file does not have it; of the 27B models it is not the size of a head."""
    model = tiny_model(
        arch, num_hidden_layers=layers, layer_types=None, hidden_size=64, intermediate_size=32, tie_word_embeddings=True
    )
    write_model(tmp_path / "model.gguf", model, arch, attention__sliding_window=16)
    config = json.loads(bytes(open_contents(tmp_path / "model.gguf").assets["config.json"]))
    assert config["query_pre_attn_scalar"] == scale


def test_a_parallel_checkpoint_of_it_equals_that_of_the_directory(tmp_path: Path) -> None:
    write_case(tmp_path / "model.gguf", "qwen3", BF16)
    convert(tmp_path / "model.gguf", tmp_path / "hf")
    for source in ("model.gguf", "hf"):
        options = ["--to", "parallel", "--tensor", "2", "--pipeline", "2"]
        arguments = ["--input", str(tmp_path / source), "--output", str(tmp_path / f"{source}-parallel"), *options]
        assert main(["convert", *arguments]) == 0
    first, second = (sorted((tmp_path / f"{source}-parallel").iterdir()) for source in ("model.gguf", "hf"))
    assert [file.name for file in first] == [file.name for file in second]
    weights = [(a, b) for a, b in zip(first, second, strict=True) if a.suffix == ".safetensors"]
    assert len(weights) == 4 and all(a.read_bytes() == b.read_bytes() for a, b in weights)


def test_dtype_is_for_gguf_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case(tmp_path / "model.gguf", "llama", F32)
    convert(tmp_path / "model.gguf", tmp_path / "hf")
    arguments = ["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "again"), "--to", "hf"]
    assert main(["convert", *arguments, "--dtype", "float32"]) == 2
    assert "--dtype: only weights of GGUF files" in capsys.readouterr().err
