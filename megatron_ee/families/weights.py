"""The released tensors of a model: names and shapes, from its family's weight table and its sizes."""

from __future__ import annotations

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import Source
from megatron_ee.families.registry import FAMILIES

EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
NON_WEIGHTS = ("inv_freq", "cos_cached", "sin_cached")
"""Suffixes of released tensors that are not weights: rotary tables, which old releases saved under several prefixes."""

Shape = tuple[int, ...]


def head_name(arch: Architecture) -> str:
    """Released name of the LM head; the input embedding's if they are tied."""
    return EMBEDDING if arch.tied else LM_HEAD


def layer_source(arch: Architecture, parameter: str, prefix: str) -> Source:
    """Source of a decoder layer's parameter, with released names under ``prefix``."""
    source = FAMILIES[arch.family].layer[parameter]
    return Source(tuple(f"{prefix}.{name}" for name in source.names), source.kind)


def layer_tensors(arch: Architecture) -> dict[str, Shape]:
    """Shapes of all weights of a decoder layer, by released name within the layer."""
    found: dict[str, Shape] = {}
    every = parameter_parts(arch)
    for parameter, source in FAMILIES[arch.family].layer.items():
        if parameter not in every:
            continue
        parts, names = every[parameter], source.names
        if len(names) == len(parts):
            found |= dict(zip(names, parts, strict=True))
        else:  # one released tensor holds all parts
            found[names[0]] = (sum(part[0] for part in parts), *parts[0][1:])
    return found


def expected_tensors(arch: Architecture) -> dict[str, Shape]:
    """Shapes of all weights of a checkpoint of this architecture, by released name."""
    shapes: dict[str, Shape] = {
        EMBEDDING: (arch.vocab_size, arch.hidden_size),
        FINAL_NORM: (arch.hidden_size,),
    }
    if not arch.tied:
        shapes[LM_HEAD] = (arch.vocab_size, arch.hidden_size)
    layer = layer_tensors(arch)
    for index in range(arch.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def is_non_weight(name: str, arch: Architecture) -> bool:
    """Whether a released tensor is known not to be a separate weight."""
    return name.endswith(NON_WEIGHTS) or (arch.tied and name == LM_HEAD)


def parameter_parts(arch: Architecture) -> dict[str, tuple[Shape, ...]]:
    """Shapes of the fused parts of each parameter of a decoder layer, over all ranks."""
    hidden, ffn = arch.hidden_size, arch.ffn_size
    query, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    parts: dict[str, tuple[Shape, ...]] = {
        "attention.qkv.weight": ((query, hidden), (kv, hidden), (kv, hidden)),
        "attention.output.weight": ((hidden, query),),
        "mlp.gate_up.weight": ((ffn, hidden), (ffn, hidden)),
        "mlp.down.weight": ((hidden, ffn),),
    }
    if arch.norms_before:
        parts["attention_norm.weight"] = parts["mlp_norm.weight"] = ((hidden,),)
    if arch.norms_after:
        parts["attention_post_norm.weight"] = parts["mlp_post_norm.weight"] = ((hidden,),)
    if arch.qkv_bias:
        parts["attention.qkv.bias"] = ((query,), (kv,), (kv,))
    if arch.output_bias:
        parts["attention.output.bias"] = ((hidden,),)
    if arch.qk_norm_whole:
        parts["attention.q_norm.weight"], parts["attention.k_norm.weight"] = ((query,),), ((kv,),)
    elif arch.qk_norm:
        parts["attention.q_layernorm.weight"] = parts["attention.k_layernorm.weight"] = ((arch.head_dim,),)
    if arch.mlp_bias:
        parts["mlp.gate_up.bias"] = ((ffn,), (ffn,))
        parts["mlp.down.bias"] = ((hidden,),)
    return parts
