"""The declarations of a family: reading its ``config.json``, names of its tensors, shallower configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.reading import Config

Kind = Literal["whole", "rows", "columns", "vocabulary", "gated", "qkv"]


@dataclass(frozen=True)
class Source:
    """The released tensors of one parameter.

    Attributes:
        names: released names, one for each part of the parameter in the order of its parts, or one for all of them.
        kind: how the parameter is cut: ``whole`` (every rank has all), ``rows``, ``columns``, ``vocabulary``
            (rows, padded), ``gated`` (parts gate and up), ``qkv`` (parts query, key, value, by key-value group).
    """

    names: tuple[str, ...]
    kind: Kind


LayerTable = Mapping[str, Source]
"""Parameter of a decoder layer -> the released tensors that it is made of, by their names within the layer."""

LLAMA_LAYER: LayerTable = {
    "attention_norm.weight": Source(("input_layernorm.weight",), "whole"),
    "attention.qkv.weight": Source(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "qkv"
    ),
    "attention.qkv.bias": Source(("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), "qkv"),
    "attention.output.weight": Source(("self_attn.o_proj.weight",), "columns"),
    "attention.output.bias": Source(("self_attn.o_proj.bias",), "whole"),
    "attention.q_layernorm.weight": Source(("self_attn.q_norm.weight",), "whole"),
    "attention.k_layernorm.weight": Source(("self_attn.k_norm.weight",), "whole"),
    "mlp_norm.weight": Source(("post_attention_layernorm.weight",), "whole"),
    "mlp.gate_up.weight": Source(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gated"),
    "mlp.gate_up.bias": Source(("mlp.gate_proj.bias", "mlp.up_proj.bias"), "gated"),
    "mlp.down.weight": Source(("mlp.down_proj.weight",), "columns"),
    "mlp.down.bias": Source(("mlp.down_proj.bias",), "whole"),
}
"""The names of Llama's layers, which most families use."""


def pick_layers(config: Mapping[str, Any], architecture: Architecture, layers: Sequence[int]) -> dict[str, Any]:
    """``config.json`` of a model of some of the layers: lists with an entry per layer are picked from, all else stays.

    Args:
        config: of the whole model.
        architecture: of the whole model.
        layers: of the whole model, from 0, in the order of the new one.
    """
    result = dict(config)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == architecture.num_layers and not _holds_names_or_tokens(key):
            result[key] = [value[layer] for layer in layers]
    return {**result, "num_hidden_layers": len(layers)}


def _holds_names_or_tokens(key: str) -> bool:
    """Lists that have no entry per layer, however many there are: ``eos_token_id`` of Llama 3 is a list of three."""
    return key == "architectures" or key.endswith(("_token_id", "_tokens", "_ids"))


def pick_layers_by_type(config: Mapping[str, Any], architecture: Architecture, layers: Sequence[int]) -> dict[str, Any]:
    """As ``pick_layers``, with ``layer_types`` spelled out: in files without it, layers follow a pattern."""
    kinds = ["full_attention" if architecture.windows[layer] is None else "sliding_attention" for layer in layers]
    return {**pick_layers(config, architecture, layers), "layer_types": kinds}


@dataclass(frozen=True)
class Family:
    """One family of released models.

    Attributes:
        model_type: as ``config.json`` names it; ``Architecture.family``.
        architecture: the class in ``architectures``.
        parse: ``config.json`` -> ``Architecture``; raises CheckpointError.
        layer: the weight table of a decoder layer.
        pick: ``config.json`` of a model of some of the layers; see ``pick_layers``.
        auto_map: entries of ``auto_map`` in ``config.json`` that are known to mean this same model. They are ignored,
            and any other is refused; code of a checkpoint is never run.
    """

    model_type: str
    architecture: str
    parse: Callable[[Config], Architecture]
    layer: LayerTable
    pick: Callable[[Mapping[str, Any], Architecture, Sequence[int]], dict[str, Any]] = pick_layers
    auto_map: Mapping[str, str] = field(default_factory=dict)
