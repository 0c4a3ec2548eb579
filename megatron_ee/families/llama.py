"""Llama 1 to 3.x, SmolLM2, and other models released as ``LlamaForCausalLM``."""

from __future__ import annotations

from dataclasses import replace

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import LLAMA_LAYER, Family
from megatron_ee.families.reading import Config, plain_architecture


def _parse(config: Config) -> Architecture:
    bias = config.flag("attention_bias")
    plain = plain_architecture(config, "llama", positions=2048)
    return replace(plain, qkv_bias=bias, output_bias=bias, mlp_bias=config.flag("mlp_bias"))


LLAMA = Family("llama", "LlamaForCausalLM", _parse, LLAMA_LAYER)
