"""Qwen2 and Qwen2.5: Llama with biases of query, key and value, and windows that can be switched on."""

from __future__ import annotations

from dataclasses import replace

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import LLAMA_LAYER, Family, pick_layers_of_qwen
from megatron_ee.families.reading import Config, plain_architecture, switched_windows


def _parse(config: Config) -> Architecture:
    plain = plain_architecture(config, "qwen2", positions=32_768, kv_heads=32)
    return replace(plain, qkv_bias=True, windows=switched_windows(config, plain.num_layers))


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _parse, LLAMA_LAYER, pick=pick_layers_of_qwen)
