"""OLMo 2: norms after attention and MLP instead of before; norms over the whole query and key projections."""

from __future__ import annotations

from dataclasses import replace

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import LLAMA_LAYER, Family, LayerTable, Source
from megatron_ee.families.reading import Config, plain_architecture

OLMO_LAYER: LayerTable = {
    "attention.qkv.weight": LLAMA_LAYER["attention.qkv.weight"],
    "attention.qkv.bias": LLAMA_LAYER["attention.qkv.bias"],
    "attention.q_norm.weight": Source(("self_attn.q_norm.weight",), "rows"),
    "attention.k_norm.weight": Source(("self_attn.k_norm.weight",), "rows"),
    "attention.output.weight": LLAMA_LAYER["attention.output.weight"],
    "attention.output.bias": LLAMA_LAYER["attention.output.bias"],
    "attention_post_norm.weight": Source(("post_attention_layernorm.weight",), "whole"),
    "mlp.gate_up.weight": LLAMA_LAYER["mlp.gate_up.weight"],
    "mlp.down.weight": LLAMA_LAYER["mlp.down.weight"],
    "mlp_post_norm.weight": Source(("post_feedforward_layernorm.weight",), "whole"),
}


def _parse(config: Config) -> Architecture:
    bias = config.flag("attention_bias")
    return replace(
        plain_architecture(config, "olmo2", positions=2048, eps=1e-5),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        qk_norm_whole=True,
        norm_placement="after",
    )


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", _parse, OLMO_LAYER)
