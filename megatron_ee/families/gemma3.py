"""Gemma 3's text models: norms before and after, two rotary bases, windows at five layers of six."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_ee.config.architecture import Architecture
from megatron_ee.errors import shown
from megatron_ee.families.family import LLAMA_LAYER, Family, LayerTable, Source, pick_layers_by_type
from megatron_ee.families.reading import (
    FULL,
    SLIDING,
    Config,
    plain_architecture,
    read_layer_types,
    read_ropes_by_type,
    read_window,
    windows_by_type,
)

GEMMA_LAYER: LayerTable = {
    **LLAMA_LAYER,
    "attention_post_norm.weight": Source(("post_attention_layernorm.weight",), "whole"),
    "mlp_norm.weight": Source(("pre_feedforward_layernorm.weight",), "whole"),
    "mlp_post_norm.weight": Source(("post_feedforward_layernorm.weight",), "whole"),
}


def _parse(config: Config) -> Architecture:
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if config.values.get(key):
            raise config.error(f"{key} is not supported for gemma3_text; released files have none")
    check_gemma(config)
    positions = config.integer("max_position_embeddings", 131_072)
    full, local = read_ropes_by_type(config, positions, 1_000_000.0, 10_000.0, "rope_local_base_freq")
    plain = plain_architecture(
        config,
        "gemma3_text",
        positions=131_072,
        kv_heads=4,
        head_dim=256,
        tied=True,
        rope=full,
        activation="gelu_tanh",
    )
    kinds = read_layer_types(config, plain.num_layers)
    interval = config.integer("sliding_window_pattern", 6)
    kinds = kinds or [SLIDING if (layer + 1) % interval else FULL for layer in range(plain.num_layers)]
    return replace(
        plain,
        **gemma_options(config, plain.hidden_size, kinds),
        qk_norm=True,
        local_rope=None if local == full else local,
    )


def gemma_options(config: Config, hidden_size: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Fields of ``Architecture`` that Gemma 2 and 3 have in common; ``kinds`` of attention, by layer."""
    bias = config.flag("attention_bias")
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "norm_placement": "sandwich",
        "norm_plus_one": True,
        "embedding_multiplier": hidden_size**0.5,
        "attention_multiplier": config.positive("query_pre_attn_scalar", 256) ** -0.5,
        "windows": windows_by_type(config, kinds, read_window(config, 4096), "sliding_window"),
    }


def check_gemma(config: Config) -> None:
    """Refuse bidirectional attention and other activations, which no released Gemma has."""
    if config.values.get("use_bidirectional_attention"):
        raise config.error("use_bidirectional_attention is not supported; released files have none")
    activation = config.values.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise config.error(f"hidden_activation {shown(activation)} is not supported, only 'gelu_pytorch_tanh'")


GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", _parse, GEMMA_LAYER, pick_layers_by_type)
