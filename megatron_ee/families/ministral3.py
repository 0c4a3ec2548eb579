"""Ministral 3's text models: Mistral with YaRN and a query scale that grows with position."""

from __future__ import annotations

from dataclasses import replace

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import LLAMA_LAYER, Family
from megatron_ee.families.mistral import windows_of_all
from megatron_ee.families.reading import Config, plain_architecture, read_rope

_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""The default in transformers."""


def _parse(config: Config) -> Architecture:
    values = dict(config.values)
    if values.get("rope_parameters") is None:
        values["rope_parameters"] = _ROPE
    rope = read_rope(Config(values, config.where), config.integer("max_position_embeddings", 262_144), kinds=("yarn",))
    settings = Config(values.get("rope_scaling") or values["rope_parameters"], config.where)
    beta = settings.positive("llama_4_scaling_beta", name="rope llama_4_scaling_beta")
    plain = plain_architecture(
        config,
        "ministral3",
        positions=262_144,
        kv_heads=8,
        head_dim=128,
        eps=1e-5,
        rope=replace(rope, query_scaling=beta),
    )
    return replace(plain, windows=windows_of_all(config, plain.num_layers, None))


MINISTRAL3 = Family("ministral3", "Ministral3ForCausalLM", _parse, LLAMA_LAYER)
