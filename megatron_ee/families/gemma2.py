"""Gemma 2: norms before and after, soft caps of attention scores and logits, windows at every other layer."""

from __future__ import annotations

from dataclasses import replace

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import Family, pick_layers_by_type
from megatron_ee.families.gemma3 import GEMMA_LAYER, check_gemma, gemma_options
from megatron_ee.families.reading import (
    FULL,
    SLIDING,
    Config,
    plain_architecture,
    read_layer_types,
)


def _parse(config: Config) -> Architecture:
    check_gemma(config)
    plain = plain_architecture(
        config, "gemma2", positions=8192, kv_heads=4, head_dim=256, tied=True, activation="gelu_tanh"
    )
    kinds = read_layer_types(config, plain.num_layers)
    kinds = kinds or [FULL if layer % 2 else SLIDING for layer in range(plain.num_layers)]
    return replace(
        plain,
        **gemma_options(config, plain.hidden_size, kinds),
        attention_soft_cap=_soft_cap(config, "attn_logit_softcapping", 50.0),
        logit_soft_cap=_soft_cap(config, "final_logit_softcapping", 30.0),
    )


def _soft_cap(config: Config, key: str, default: float) -> float | None:
    return None if config.values.get(key, default) is None else config.positive(key, default)


GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _parse, GEMMA_LAYER, pick_layers_by_type)
