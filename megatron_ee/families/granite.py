"""Granite 3: Llama with factors of the embedding, the residuals, the attention scores and the logits."""

from __future__ import annotations

from dataclasses import replace

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import LLAMA_LAYER, Family
from megatron_ee.families.reading import Config, plain_architecture


def _parse(config: Config) -> Architecture:
    bias = config.flag("attention_bias")
    return replace(
        plain_architecture(config, "granite", positions=2048),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
        embedding_multiplier=config.positive("embedding_multiplier", 1.0),
        residual_multiplier=config.positive("residual_multiplier", 1.0),
        attention_multiplier=config.positive("attention_multiplier", 1.0),
        logit_multiplier=1 / config.positive("logits_scaling", 1.0),
    )


GRANITE = Family("granite", "GraniteForCausalLM", _parse, LLAMA_LAYER)
