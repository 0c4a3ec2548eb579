"""Phi-3 and Phi-4 (mini too): fused query, key and value; fused gate and up; rotary positions for part of a head."""

from __future__ import annotations

from dataclasses import replace

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import LLAMA_LAYER, Family, LayerTable, Source
from megatron_ee.families.reading import Config, plain_architecture, read_rope, read_window

PHI_LAYER: LayerTable = {
    **LLAMA_LAYER,
    "attention.qkv.weight": Source(("self_attn.qkv_proj.weight",), "qkv"),
    "mlp.gate_up.weight": Source(("mlp.gate_up_proj.weight",), "gated"),
}


def _parse(config: Config) -> Architecture:
    positions = config.integer("max_position_embeddings", 4096)
    values = dict(config.values)
    values.setdefault("original_max_position_embeddings", 4096)
    for key in ("rope_scaling", "rope_parameters"):  # the first releases used another name for longrope
        scaling = values.get(key)
        if isinstance(scaling, dict):
            names = {name: "longrope" for name in ("type", "rope_type") if scaling.get(name) in ("su", "yarn")}
            values[key] = {**scaling, **names}
    rope = read_rope(Config(values, config.where), positions, kinds=("default", "longrope"))
    plain = plain_architecture(config, "phi3", positions=4096, eps=1e-5, rope=rope)
    turning = int(plain.head_dim * rope.fraction)
    if turning % 2 or turning < 2:
        raise config.error(f"partial_rotary_factor {rope.fraction:g} of head_dim {plain.head_dim} is not even")
    if rope.kind == "longrope" and {len(rope.short_factors), len(rope.long_factors)} != {turning // 2}:
        raise config.error(f"rope short_factor and long_factor must have {turning // 2} numbers each")
    return replace(plain, windows=(read_window(config, None),) * plain.num_layers)


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    _parse,
    PHI_LAYER,
    auto_map={  # of Phi-3-mini, Phi-3.5-mini and Phi-4-mini, released before transformers had the family
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    },
)
