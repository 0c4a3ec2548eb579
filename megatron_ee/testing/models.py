"""Tiny random models of every family, made with transformers and saved in the released format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.registry import parse_architecture

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "attention_factor": 1.2,
}
YARN_WITH_MSCALE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.5,
    "mscale_all_dim": 0.8,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 96,
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
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 32,
            "rope_parameters": {**YARN_WITH_MSCALE, "llama_4_scaling_beta": 0.5},
            "pad_token_id": 0,
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 16, "pad_token_id": 0}),
    "phi4-mini": (
        "Phi3",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 96,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
        },
    ),
    "olmo2": ("Olmo2", {"pad_token_id": 0}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 16,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
            "pad_token_id": 0,
        },
    ),
    "smollm3": ("SmolLM3", {"pad_token_id": 0}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 16,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": False,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": 16,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": False,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}
"""Family -> transformers class prefix and differences from ``SHAPE``."""
PLUS_ONE = ("Gemma2", "Gemma3")
"""Families whose norms multiply by 1 + weight."""


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A float32 transformers model with random weights, norms and biases included, in evaluation mode."""
    import transformers

    prefix, differences = FAMILIES[family]
    config = getattr(transformers, f"{prefix}{'Text' if prefix == 'Gemma3' else ''}Config")(
        **{**SHAPE, **differences, **changes}
    )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and prefix not in PLUS_ONE else 0.0
            parameter.normal_(centre, 0.2 if parameter.ndim == 1 else 0.08)
    return model


VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
MULTIMODAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("Gemma3", "siglip_vision_model", {"mm_tokens_per_image": 4}),
    "ministral3": ("Mistral3", "pixtral", {}),
}
"""Family of the text model -> transformers class prefix, type of the vision tower, settings of the whole model."""


def save_tiny_multimodal(family: str, directory: Path, *, tied: bool, renamed: bool = False) -> Any:
    """Save a multimodal model around ``tiny_model`` and return it.

    Args:
        family: family of the text model.
        directory: to write.
        tied: whether the head is tied.
        renamed: save the names of the classes in transformers instead of the names in the files on the hub.
    """
    import transformers

    prefix, tower, settings = MULTIMODAL[family]
    text = tiny_model(family, tie_word_embeddings=tied)
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text.config.to_dict(),
        vision_config={**VISION, "model_type": tower},
        tie_word_embeddings=tied,
        **settings,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).float().eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(directory, save_original_format=not renamed)
    return model


def sharpen(model: Any) -> None:
    """Make attention of a ``tiny_model`` sharp, so that it does not repeat one token."""
    with torch.no_grad():
        normed = any(name.endswith("q_norm.weight") for name, _ in model.named_parameters())
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight" if normed else ("q_proj.weight", "qkv_proj.weight")):
                parameter *= 10
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter *= 2


def save_tiny_model(family: str, directory: Path, *, seed: int = 0, **changes: Any) -> Any:
    """Save ``tiny_model`` as a Hugging Face directory and return it. ``shard`` limits the file size, such as "50KB"."""
    shard = changes.pop("shard", None)
    model = tiny_model(family, seed=seed, **changes)
    model.save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    return model


def llama2_7b() -> Architecture:
    """Llama 2 7B, for plans: a model of a size that is not made."""
    return parse_architecture(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32000,
        }
    )
