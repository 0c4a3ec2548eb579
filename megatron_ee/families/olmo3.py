"""OLMo 3: OLMo 2 with windows in three of four layers; rotary positions are not scaled in these layers."""

from __future__ import annotations

from dataclasses import replace

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import Family, pick_layers_by_type
from megatron_ee.families.olmo2 import OLMO_LAYER
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


def _parse(config: Config) -> Architecture:
    bias = config.flag("attention_bias")
    positions = config.integer("max_position_embeddings", 2048)
    full, local = read_ropes_by_type(config, positions, 500_000.0, 500_000.0)
    plain = plain_architecture(config, "olmo3", positions=2048, eps=1e-5, rope=full)
    kinds = read_layer_types(config, plain.num_layers)
    kinds = kinds or [FULL if layer % 4 == 3 else SLIDING for layer in range(plain.num_layers)]
    return replace(
        plain,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        qk_norm_whole=True,
        norm_placement="after",
        windows=windows_by_type(config, kinds, read_window(config, 4096), "sliding_window"),
        local_rope=None if local == full else local,
    )


OLMO3 = Family("olmo3", "Olmo3ForCausalLM", _parse, OLMO_LAYER, pick_layers_by_type)
