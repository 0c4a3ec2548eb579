"""Qwen2 and Qwen2.5: Llama with biases of query, key and value, and optional windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_ee.config.architecture import Architecture
from megatron_ee.errors import shown
from megatron_ee.families.family import LLAMA_LAYER, Family, pick_layers
from megatron_ee.families.reading import Config, plain_architecture, read_layer_types, read_window, windows_by_type


def _parse(config: Config) -> Architecture:
    plain = plain_architecture(config, "qwen2", positions=32_768, kv_heads=32)
    return replace(plain, qkv_bias=True, windows=qwen_windows(config, plain.num_layers))


def qwen_windows(config: Config, num_layers: int) -> tuple[int | None, ...]:
    """None unless ``use_sliding_window``; then ``layer_types``, or from layer ``max_window_layers`` on."""
    window = read_window(config, 4096) if config.flag("use_sliding_window") else None
    kinds = read_layer_types(config, num_layers)
    if kinds is not None:
        return windows_by_type(config, kinds, window, "use_sliding_window or sliding_window")
    first = config.values.get("max_window_layers", 28)
    if window is not None and type(first) is not int:
        raise config.error(f"max_window_layers must be a whole number, not {shown(first)}")
    return tuple(window if window is not None and layer >= first else None for layer in range(num_layers))


def pick_qwen_layers(config: Mapping[str, Any], architecture: Architecture, layers: Sequence[int]) -> dict[str, Any]:
    """As ``pick_layers``, with ``max_window_layers`` set to the first layer with a window in the new model."""
    result = pick_layers(config, architecture, layers)
    if config.get("layer_types") is None and config.get("use_sliding_window"):
        result["max_window_layers"] = [architecture.windows[layer] for layer in layers].count(None)
    return result


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _parse, LLAMA_LAYER, pick_qwen_layers)
