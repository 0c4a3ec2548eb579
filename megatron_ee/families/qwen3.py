"""Qwen3: norms over each head's query and key; optional windows as in Qwen2."""

from __future__ import annotations

from dataclasses import replace

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import LLAMA_LAYER, Family
from megatron_ee.families.qwen2 import pick_qwen_layers, qwen_windows
from megatron_ee.families.reading import Config, plain_architecture


def _parse(config: Config) -> Architecture:
    bias = config.flag("attention_bias")
    plain = plain_architecture(config, "qwen3", positions=32_768, kv_heads=32, head_dim=128)
    windows = qwen_windows(config, plain.num_layers)
    return replace(plain, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=windows)


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _parse, LLAMA_LAYER, pick_qwen_layers)
