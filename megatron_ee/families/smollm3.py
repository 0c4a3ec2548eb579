"""SmolLM3: Llama without rotary positions in every fourth layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_ee.config.architecture import Architecture
from megatron_ee.errors import shown
from megatron_ee.families.family import LLAMA_LAYER, Family, pick_layers_by_type
from megatron_ee.families.reading import (
    FULL,
    SLIDING,
    Config,
    plain_architecture,
    read_layer_types,
    read_window,
    windows_by_type,
)


def _parse(config: Config) -> Architecture:
    bias = config.flag("attention_bias")
    plain = plain_architecture(config, "smollm3", positions=32_768, kv_heads=4, tied=True, theta=2_000_000.0)
    rotated = _rotated(config, plain.num_layers)
    window = read_window(config, None) if config.flag("use_sliding_window") else None
    kinds = read_layer_types(config, plain.num_layers)
    kinds = kinds or [FULL if window is None or each else SLIDING for each in rotated]
    return replace(
        plain,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
        rotated=() if all(rotated) else rotated,
        windows=windows_by_type(config, kinds, window, "use_sliding_window or sliding_window"),
    )


def _rotated(config: Config, num_layers: int) -> tuple[bool, ...]:
    """Whether each layer has rotary positions. Despite its name, a 1 in ``no_rope_layers`` means rotary positions."""
    listed = config.values.get("no_rope_layers")
    if listed is None:
        interval = config.integer("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not isinstance(listed, list) or len(listed) < num_layers or any(each not in (0, 1) for each in listed):
        raise config.error(f"no_rope_layers must list 0 or 1 for each of {num_layers} layers, not {shown(listed)}")
    return tuple(bool(each) for each in listed[:num_layers])


def _pick(config: Mapping[str, Any], architecture: Architecture, layers: Sequence[int]) -> dict[str, Any]:
    rotated = architecture.rotated or (True,) * architecture.num_layers
    return {
        **pick_layers_by_type(config, architecture, layers),
        "no_rope_layers": [int(rotated[layer]) for layer in layers],
    }


SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", _parse, LLAMA_LAYER, _pick)
