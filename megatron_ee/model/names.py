"""The name table: which released tensors each parameter here is made of, and where this rank's part of it lies.

A parameter is made of one released tensor, or of several fused ones: q, k and v by key-value group, gate and up. How
they are cut over tensor-parallel ranks is a matter of the *kind* of mapping, so a family's table holds names only.
``blocks`` spells a parameter out as boxes of released tensors; loading fills them and saving writes them, so both
directions are one description.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_ee.config.architecture import Architecture
from megatron_ee.model.backbone import Backbone

Kind = Literal["whole", "columns", "vocabulary", "gated", "qkv"]


@dataclass(frozen=True)
class Source:
    """Released tensors that one parameter is made of.

    Attributes:
        names: released names; several where they are fused, in the order of the fusion.
        kind: how the parameter is cut: ``whole`` (every rank has all), ``columns``, ``vocabulary`` (rows,
            padded), ``gated`` (rows of gate, then of up), ``qkv`` (rows by key-value group).
    """

    names: tuple[str, ...]
    kind: Kind


@dataclass(frozen=True)
class Block:
    """A box of a released tensor, and the memory on this rank that holds it.

    Attributes:
        name: released name.
        shape: of the whole released tensor.
        offset: where the box starts in it.
        tensor: view into the parameter, of the box's shape.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


LAYER: dict[str, tuple[tuple[str, ...], Kind]] = {
    "attention_norm.weight": (("input_layernorm.weight",), "whole"),
    "attention.qkv.weight": (("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "qkv"),
    "attention.qkv.bias": (("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), "qkv"),
    "attention.output.weight": (("self_attn.o_proj.weight",), "columns"),
    "attention.output.bias": (("self_attn.o_proj.bias",), "whole"),
    "attention.q_layernorm.weight": (("self_attn.q_norm.weight",), "whole"),
    "attention.k_layernorm.weight": (("self_attn.k_norm.weight",), "whole"),
    "mlp_norm.weight": (("post_attention_layernorm.weight",), "whole"),
    "mlp.gate_up.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gated"),
    "mlp.gate_up.bias": (("mlp.gate_proj.bias", "mlp.up_proj.bias"), "gated"),
    "mlp.down.weight": (("mlp.down_proj.weight",), "columns"),
    "mlp.down.bias": (("mlp.down_proj.bias",), "whole"),
}
EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
NON_WEIGHTS = ("inv_freq", "cos_cached", "sin_cached")
"""Endings of released tensors that hold no weight: rotary tables, which old releases saved under several prefixes."""


def layer_source(parameter: str, prefix: str) -> Source:
    """Source of a decoder layer's parameter, its released names under ``prefix``."""
    names, kind = LAYER[parameter]
    return Source(tuple(f"{prefix}.{name}" for name in names), kind)


def head_name(arch: Architecture) -> str:
    """Released name of the LM head: the input embedding's where they are tied."""
    return EMBEDDING if arch.tied else LM_HEAD


def backbone_sources(backbone: Backbone) -> Iterator[tuple[Tensor, Source]]:
    """Every parameter of the backbone's part on this rank, each once, with where it comes from."""
    arch = backbone.setup.architecture
    for name, parameter in backbone.named_parameters():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            yield parameter, layer_source(rest, f"model.layers.{int(number) - 1}")
        elif name == "final_norm.weight":
            yield parameter, Source((FINAL_NORM,), "whole")
        else:
            yield parameter, Source((EMBEDDING if name == "embedding.weight" else head_name(arch),), "vocabulary")


def blocks(parameter: Tensor, source: Source, arch: Architecture, rank: int, size: int) -> list[Block]:
    """The boxes of released tensors that tensor-parallel rank ``rank`` of ``size`` holds in ``parameter``.

    ``parameter`` may also be anything shaped like it, such as its optimizer state. Rows that pad the vocabulary
    belong to no block.
    """
    tensor = parameter.detach()
    name = source.names[0]
    if source.kind == "whole":
        return [Block(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor)]
    if source.kind == "columns":
        rows, columns = tensor.shape
        return [Block(name, (rows, columns * size), (0, columns * rank), tensor)]
    if source.kind == "vocabulary":
        start = rank * len(tensor)
        real = tensor[: max(0, arch.vocab_size - start)]
        return [_rows(name, real, start, arch.vocab_size)] if len(real) else []
    if source.kind == "gated":
        half = len(tensor) // 2
        parts = zip(source.names, tensor.split(half), strict=True)
        return [_rows(name, part, rank * half, size * half) for name, part in parts]
    return list(_qkv_blocks(tensor, source.names, arch, rank, size))


def _rows(name: str, tensor: Tensor, start: int, total: int) -> Block:
    return Block(name, (total, *tensor.shape[1:]), (start,) + (0,) * (tensor.ndim - 1), tensor)


def _qkv_blocks(tensor: Tensor, names: tuple[str, ...], arch: Architecture, rank: int, size: int) -> Iterator[Block]:
    """Per key-value group: its query heads, its key, its value, each a run of rows of its released tensor."""
    groups, dim = arch.num_kv_heads // size, arch.head_dim
    queries = arch.num_heads // arch.num_kv_heads
    for local, part in enumerate(tensor.chunk(groups)):
        group = rank * groups + local
        for name, rows, heads in zip(names, part.split([queries * dim, dim, dim]), (queries, 1, 1), strict=True):
            yield _rows(name, rows, group * heads * dim, arch.num_kv_heads * heads * dim)


def expected_tensors(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Released name -> shape of every weight that a checkpoint of this architecture must hold."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (arch.vocab_size, arch.hidden_size),
        FINAL_NORM: (arch.hidden_size,),
    }
    if not arch.tied:
        shapes[LM_HEAD] = (arch.vocab_size, arch.hidden_size)
    layer = layer_tensors(arch)
    for index in range(arch.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def layer_tensors(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Released name within a layer -> shape of every weight of a decoder layer."""
    hidden, query, kv = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (arch.ffn_size, hidden),
        "mlp.up_proj.weight": (arch.ffn_size, hidden),
        "mlp.down_proj.weight": (hidden, arch.ffn_size),
    }
    if arch.qkv_bias:
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", query), ("k", kv), ("v", kv))}
    if arch.output_bias:
        layer["self_attn.o_proj.bias"] = (hidden,)
    if arch.qk_norm:
        layer |= {"self_attn.q_norm.weight": (arch.head_dim,), "self_attn.k_norm.weight": (arch.head_dim,)}
    if arch.mlp_bias:
        layer |= {"mlp.gate_proj.bias": (arch.ffn_size,), "mlp.up_proj.bias": (arch.ffn_size,)}
        layer["mlp.down_proj.bias"] = (hidden,)
    return layer


def is_non_weight(name: str, arch: Architecture) -> bool:
    """Whether a released tensor is known to hold no weight of its own."""
    return name.endswith(NON_WEIGHTS) or (arch.tied and name == LM_HEAD)
