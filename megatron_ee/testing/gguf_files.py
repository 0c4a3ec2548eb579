"""Writes tiny GGUF files of transformers' models, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers

from megatron_ee.families.registry import parse_architecture
from megatron_ee.families.weights import expected_tensors

F32, BF16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16
CONTROL, NORMAL = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)


def write_model(
    path: Path,
    model: Any,
    arch: str,
    *,
    quantised: gguf.GGMLQuantizationType = F32,
    embedding: gguf.GGMLQuantizationType | None = None,
    extra: dict[str, np.ndarray] | None = None,
    chat_template: str | None = None,
    part_tensors: int = 0,
    **keys: Any,
) -> None:
    """Write ``model`` with matrices stored as ``quantised``, and the embedding as ``embedding``.

    Args:
        arch: ``general.architecture``.
        extra: more tensors.
        chat_template: of the tokenizer; None for none.
        part_tensors: tensors of a part, after a first one that has only the metadata; 0 for one file. Parts are named
            after ``path``, as llama.cpp names them.
        keys: metadata that differ: of the architecture, with "__" for a dot; None leaves a key out.
    """
    config = model.config
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "rope.dimension_count": head_dim(config),
        "rope.freq_base": 10_000.0,
    }
    values |= {key.replace("__", "."): value for key, value in keys.items()}
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=part_tensors, small_first_shard=part_tensors > 0)
    for key, value in values.items():
        if value is not None:
            add_value(writer, f"{arch}.{key}", value)
    add_tokens(writer, config.vocab_size)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, data in model_tensors(model, arch).items():
        matrix, kind = data.ndim == 2, quantised
        if name == "token_embd.weight":
            kind = embedding or quantised
        stored = gguf.quantize(data, kind) if matrix and kind != F32 else data
        writer.add_tensor(name, stored, raw_dtype=kind if matrix else F32)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    finish(writer)


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a value in the type that llama.cpp's converter gives it."""
    if isinstance(value, (bool, str, float)):
        add: dict[type, Callable[..., None]] = {
            bool: writer.add_bool,
            str: writer.add_string,
            float: writer.add_float32,
        }
        add[type(value)](key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_array(key, value)


def add_tokens(writer: gguf.GGUFWriter, count: int) -> None:
    """A byte-level vocabulary with two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet[: count - 4], "".join(alphabet[:2])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (count - 3))
    writer.add_token_merges([" ".join(alphabet[:2])])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_tensors(model: Any, arch: str) -> dict[str, np.ndarray]:
    """The model's tensors under GGUF's names, transformed as GGUF has them, in float32."""
    config = model.config
    architecture = parse_architecture({**config.to_dict(), "architectures": [type(model).__name__]})
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], config.num_hidden_layers)
    state, found = model.state_dict(), {}
    for name in expected_tensors(architecture):
        tensor = state[name]
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if arch == "llama" and part in name:
                halves = tensor.view(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        place = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert place is not None, name
        found[place] = tensor.to(torch.float32).contiguous().numpy()
    return found
