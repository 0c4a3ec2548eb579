"""The interface of a family: reading its ``config.json``, names of its tensors, shallower configurations."""

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
        names: released names: one per part of the parameter, in their order, or one for all parts.
        kind: tensor-parallel sharding: ``whole`` (not sharded), ``rows``, ``columns``, ``vocabulary`` (padded rows),
            ``gated`` (parts gate and up), ``qkv`` (parts query, key, value, by key-value group).
    """

    names: tuple[str, ...]
    kind: Kind


LayerTable = Mapping[str, Source]
"""Parameter of a decoder layer -> its released tensors, by their names within the layer."""

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
    """``config.json`` of a model with some of the layers. Only lists with one entry per layer change.

    Args:
        config: of the whole model.
        architecture: of the whole model.
        layers: layers of the whole model, from 0, in the order of the new model.
    """
    result = dict(config)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == architecture.num_layers and not _holds_names_or_tokens(key):
            result[key] = [value[layer] for layer in layers]
    return {**result, "num_hidden_layers": len(layers)}


def _holds_names_or_tokens(key: str) -> bool:
    """Whether a list never has one entry per layer, whatever its length, such as ``eos_token_id`` of Llama 3."""
    return key == "architectures" or key.endswith(("_token_id", "_tokens", "_ids"))


def pick_layers_by_type(config: Mapping[str, Any], architecture: Architecture, layers: Sequence[int]) -> dict[str, Any]:
    """As ``pick_layers``, and add ``layer_types``, because layers follow a pattern in files without it."""
    kinds = ["full_attention" if architecture.windows[layer] is None else "sliding_attention" for layer in layers]
    return {**pick_layers(config, architecture, layers), "layer_types": kinds}


@dataclass(frozen=True)
class Family:
    """One family of released models.

    Attributes:
        model_type: ``model_type`` in ``config.json``; also ``Architecture.family``.
        architecture: the class in ``architectures``.
        parse: ``config.json`` -> ``Architecture``; raises CheckpointError.
        layer: the weight table of a decoder layer.
        pick: returns ``config.json`` of a model with some of the layers; see ``pick_layers``.
        auto_map: entries of ``auto_map`` in ``config.json`` that refer to this same model, without the repository that
            may stand before ``--``. They are ignored, and any other entry is refused. No such code is ever run.
    """

    model_type: str
    architecture: str
    parse: Callable[[Config], Architecture]
    layer: LayerTable
    pick: Callable[[Mapping[str, Any], Architecture, Sequence[int]], dict[str, Any]] = pick_layers
    auto_map: Mapping[str, str] = field(default_factory=dict)
