"""Configurations with the keys of real releases, shrunk: every key means here what it means in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_logits import assert_close, make_tokens, reference_logits, stage_logits

from megatron_ee.exits.stage import Stage
from megatron_ee.families.registry import read_architecture

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 131,
    "initializer_range": 0.08,
}
LLAMA = {
    "_name_or_path": "somewhere/else",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
MISTRAL |= {"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 101,
    "eos_token_id": 102,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_sliding_window": False,
}
QWEN3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
QWEN3 |= {"attention_bias": False, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None}
LLAMA3 = {**LLAMA, "num_key_value_heads": 2, "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0}
LLAMA3 |= {"max_position_embeddings": 256, "eos_token_id": [125, 126, 127, 128], "torch_dtype": "bfloat16"}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

RELEASED: dict[str, dict[str, Any]] = {
    "LLaMA 7B, no positions, no key-value heads": {**LLAMA, "max_sequence_length": 64, "rms_norm_eps": 1e-6},
    "Llama 2 7B": {**LLAMA, "max_position_embeddings": 64, "num_key_value_heads": 4, "rope_scaling": None},
    "Vicuna 7B 1.5 16k": {
        **LLAMA,
        "max_position_embeddings": 32,
        "max_sequence_length": 128,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "Code Llama": {**LLAMA, "max_position_embeddings": 256, "rope_theta": 1000000, "num_key_value_heads": 4},
    "Llama 3.1 8B": {**LLAMA3, "rope_scaling": {**LLAMA3_ROPE, "rope_type": "llama3"}},
    "Llama 3.2 1B": {
        **LLAMA3,
        "head_dim": 24,
        "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0, "rope_type": "llama3"},
        "tie_word_embeddings": True,
    },
    "Llama 3.2 1B of recent transformers": {
        **{key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "torch_dtype")},
        "dtype": "bfloat16",
        "rope_parameters": {**LLAMA3_ROPE, "rope_type": "llama3", "rope_theta": 500000.0},
    },
    "Mistral 7B 0.1": {**MISTRAL, "rope_theta": 10000.0, "sliding_window": 16},
    "Mistral 7B 0.3": {**MISTRAL, "rope_theta": 1000000.0, "sliding_window": None, "head_dim": None},
    "Mistral Nemo": {**MISTRAL, "rope_theta": 1000000.0, "sliding_window": None, "head_dim": 20},
    "Qwen2 0.5B": {**QWEN2, "max_window_layers": 2, "sliding_window": 16, "tie_word_embeddings": True},
    "Qwen2.5 7B": {**QWEN2, "max_window_layers": 4, "sliding_window": 256, "rope_scaling": None},
    "Qwen2 with its window on": {**QWEN2, "max_window_layers": 2, "sliding_window": 16, "use_sliding_window": True},
    "Qwen3 8B": {**QWEN3, "max_window_layers": 4, "eos_token_id": [101, 102]},
    "Qwen3 0.6B of recent transformers": {
        **{key: value for key, value in QWEN3.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")},
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 4,
        "max_window_layers": 4,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_logits(name: str, tmp_path: Path, load_stage: Callable[..., Stage]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    (tmp_path / "config.json").write_text(json.dumps({**RELEASED[name], **SMALL}))
    config = AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    tensors = {key: value.contiguous() for key, value in reference.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_architecture(tmp_path).tied == config.tie_word_embeddings
    tokens = make_tokens(rows=1, length=64)
    assert_close(stage_logits(load_stage(tmp_path), tokens), reference_logits(reference, tokens))
