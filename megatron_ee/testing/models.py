"""Tiny random models of every family, made with transformers and saved as released ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama3.2-tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 32}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}
"""Family -> transformers class prefix and what differs from ``SHAPE``."""


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A float32 transformers model with random weights, norms and biases included, in evaluation mode."""
    import transformers

    prefix, differences = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**SHAPE, **differences, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.normal_(centre, 0.2 if parameter.ndim == 1 else 0.08)
    return model


def save_tiny_model(family: str, directory: Path, *, seed: int = 0, **changes: Any) -> Any:
    """Save ``tiny_model`` as a Hugging Face directory and return it. ``shard`` is the largest file, such as "50KB"."""
    shard = changes.pop("shard", None)
    model = tiny_model(family, seed=seed, **changes)
    model.save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    return model
