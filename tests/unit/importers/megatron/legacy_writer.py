"""Writes what Megatron-LM and EE-LLM would save of a transformers model: one pickle per rank, and its arguments.

It cuts and names weights by Megatron's rules, written down here once more, so that reading them is held against
something else than its own tables.
"""

from __future__ import annotations

import argparse
import enum
import random
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

PADDING = 7.0  # fills rows that pad the vocabulary


class ModelType(enum.Enum):
    """Stands for the enums of Megatron's that its arguments hold."""

    encoder_or_decoder = 1


@dataclass(frozen=True)
class Exits:
    """EE-LLM's exits: on which layers, of which kind, and the tensors of each as an adapter names them."""

    layers: list[int]
    body: str
    own: bool
    before: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, layer: int, name: str) -> Tensor:
        return self.tensors[f"exits.{layer - self.before}.{name}"]


@dataclass(frozen=True)
class Layout:
    """How a model is cut, and in which of Megatron's spellings it is saved.

    These are ``old``, ``layernorm`` (the first spelling of that), ``core``, and ``fused`` (core with Transformer
    Engine).
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    spelling: str = "old"


def write_legacy(
    directory: Path, model: Any, layout: Layout, *, exits: Exits | None = None, iteration: int = 5, **changes: Any
) -> Path:
    """Save ``model`` as iteration ``iteration``; ``changes`` are other arguments. Returns the iteration's directory."""
    args = {**megatron_args(model.config, layout, exits), **changes}
    folder = directory / f"iter_{iteration:07}"
    for stage in range(layout.pipeline):
        for rank in range(layout.tensor):
            parts = [_part(model, layout, stage, virtual, rank, exits) for virtual in range(layout.virtual)]
            content: dict[str, Any] = {
                "args": argparse.Namespace(**args, model_type=ModelType.encoder_or_decoder),
                "checkpoint_version": 3.0,
                "iteration": iteration,
                **_other_state(),
            }
            if layout.virtual == 1:
                content["model"] = parts[0]
            else:
                content |= {f"model{number}": part for number, part in enumerate(parts)}
            name = f"mp_rank_{rank:02}" + (f"_{stage:03}" if layout.pipeline > 1 else "")
            (folder / name).mkdir(parents=True)
            torch.save(content, folder / name / "model_optim_rng.pt")
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def megatron_args(config: Any, layout: Layout, exits: Exits | None) -> dict[str, Any]:
    """The arguments of a run that would train this model."""
    biases = getattr(config, "mlp_bias", False)
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    args = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_base": int(config.rope_parameters["rope_theta"]),
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": biases,
        "add_qkv_bias": config.model_type == "qwen2",
        "qk_layernorm": config.model_type == "qwen3",
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "window_size": (window - 1, 0) if window else None,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": padded(config.vocab_size, layout.tensor),
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "params_dtype": torch.float32,
    }
    if exits is not None:
        args |= {
            "exit_layer_nums": exits.layers,
            "exit_layer_weight": [0.5 * layer for layer in exits.layers],
            "use_exit_mlp": exits.body == "mlp",
            "use_exit_block": exits.body == "layer",
            "use_exit_norm": exits.body != "embedding",
            "untie_exit_output_weights": exits.own,
            "pre_exit": exits.before,
        }
    return args


def padded(vocab: int, tensor: int) -> int:
    """Rows of the embedding, a multiple of 16 on each rank."""
    return -(-vocab // (16 * tensor)) * 16 * tensor


def _other_state() -> dict[str, Any]:
    """What a run saves besides the model."""
    return {
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0], "lr": 1e-4}]},
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": numpy.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
            }
        ],
    }


def _part(model: Any, layout: Layout, stage: int, virtual: int, rank: int, exits: Exits | None) -> dict[str, Any]:
    """One model of one rank, as Megatron's ``state_dict_for_save_checkpoint`` gives it."""
    config, weights = model.config, {name: tensor.detach() for name, tensor in model.state_dict().items()}
    number = virtual * layout.pipeline + stage
    each = config.num_hidden_layers // (layout.pipeline * layout.virtual)
    first, last = number == 0, number == layout.pipeline * layout.virtual - 1
    cut = _Cut(config, layout.tensor, rank)
    layers: dict[str, Tensor] = OrderedDict()
    for index in range(each):
        layer = number * each + index + 1
        with_exit = exits is not None and layer in exits.layers
        held = _layer(weights, f"model.layers.{layer - 1}.", cut)
        trunk = bool(with_exit and exits is not None and exits.body == "mlp")
        layers |= {f"layers.{index}.{key}": value for key, value in _spelled(held, layout.spelling, trunk).items()}
        if with_exit and exits is not None:
            layers |= {f"layers.{index}.{key}": value for key, value in _exit(exits, layer, cut).items()}
    norm, embedding = weights["model.norm.weight"], weights["model.embed_tokens.weight"]
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    if layout.spelling in ("core", "fused"):
        with_head = last and (not first or not config.tie_word_embeddings)
        return _core(layers, cut, embedding if first else None, norm if last else None, head if with_head else None)
    spelt = "layernorm" if layout.spelling == "layernorm" else "norm"
    encoder = "transformer" if layout.spelling == "layernorm" else "encoder"
    language: dict[str, Any] = {encoder: layers}
    if last:
        layers[f"final_{spelt}.weight"] = norm.clone()
        if not config.tie_word_embeddings:
            language["output_layer"] = OrderedDict(weight=cut.vocabulary(head))
    if first:
        language["embedding"] = {"word_embeddings": OrderedDict(weight=cut.vocabulary(embedding))}
    here = [layer for layer in exits.layers if 0 < layer - number * each <= each] if exits is not None else []
    if exits is not None and exits.own and here:
        heads = [cut.vocabulary(exits.tensor(layer, "lm_head.weight")) for layer in here]
        language["exit_output_layer"] = OrderedDict((f"{index}.weight", head) for index, head in enumerate(heads))
    part: dict[str, Any] = {"language_model": language}
    if config.tie_word_embeddings and (last or here) and not first:
        part["word_embeddings_for_head"] = OrderedDict(weight=cut.vocabulary(embedding))
    return part


def _core(
    layers: dict[str, Tensor], cut: _Cut, embedding: Tensor | None, norm: Tensor | None, head: Tensor | None
) -> dict[str, Any]:
    part: dict[str, Any] = OrderedDict((f"decoder.{key}", value) for key, value in layers.items())
    part["decoder.layers.0.self_attention.linear_proj._extra_state"] = None
    if embedding is not None:
        part["embedding.word_embeddings.weight"] = cut.vocabulary(embedding)
    if norm is not None:
        part["decoder.final_layernorm.weight"] = norm.clone()
        part["decoder.final_layernorm._extra_state"] = torch.zeros(2, dtype=torch.uint8)
    if head is not None:
        part["output_layer.weight"] = cut.vocabulary(head)
        part["output_layer._extra_state"] = None
    return part


@dataclass(frozen=True)
class _Cut:
    """What one of ``size`` ranks holds of a tensor."""

    config: Any
    size: int
    rank: int

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.size, dim=0)[self.rank].clone()

    def columns(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.size, dim=1)[self.rank].clone()

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.cat([self.rows(gate), self.rows(up)])

    def qkv(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups, inner = self.config.num_key_value_heads, q.shape[1:]
        parts = [tensor.reshape(groups, -1, *inner) for tensor in (q, k, v)]
        return self.rows(torch.cat(parts, dim=1).reshape(-1, *inner))

    def vocabulary(self, tensor: Tensor) -> Tensor:
        rows = torch.full((padded(len(tensor), self.size), tensor.shape[1]), PADDING, dtype=tensor.dtype)
        rows[: len(tensor)] = tensor
        return self.rows(rows)


def _layer(weights: dict[str, Tensor], prefix: str, cut: _Cut) -> dict[str, Tensor]:
    """A rank's part of a decoder layer, under the newest of the old names."""
    held = {
        "input_norm.weight": weights[f"{prefix}input_layernorm.weight"].clone(),
        "post_attention_norm.weight": weights[f"{prefix}post_attention_layernorm.weight"].clone(),
        "self_attention.dense.weight": cut.columns(weights[f"{prefix}self_attn.o_proj.weight"]),
        **_mlp({key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}, cut),
    }
    for kind in ("weight", "bias"):
        qkv = [weights.get(f"{prefix}self_attn.{name}_proj.{kind}") for name in "qkv"]
        if qkv[0] is not None:
            held[f"self_attention.query_key_value.{kind}"] = cut.qkv(*qkv)
    for name in ("q_norm", "k_norm"):
        if f"{prefix}self_attn.{name}.weight" in weights:
            held[f"self_attention.{name}.weight"] = weights[f"{prefix}self_attn.{name}.weight"].clone()
    if f"{prefix}self_attn.o_proj.bias" in weights:
        held["self_attention.dense.bias"] = weights[f"{prefix}self_attn.o_proj.bias"].clone()
    return held


def _mlp(weights: dict[str, Tensor], cut: _Cut) -> dict[str, Tensor]:
    held = {
        "mlp.dense_h_to_4h.weight": cut.gated(weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]),
        "mlp.dense_4h_to_h.weight": cut.columns(weights["mlp.down_proj.weight"]),
    }
    if "mlp.gate_proj.bias" in weights:
        held["mlp.dense_h_to_4h.bias"] = cut.gated(weights["mlp.gate_proj.bias"], weights["mlp.up_proj.bias"])
        held["mlp.dense_4h_to_h.bias"] = weights["mlp.down_proj.bias"].clone()
    return held


CORE_NAMES = {
    "input_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "pre_mlp_layernorm.weight",
    "self_attention.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attention.k_norm.weight": "self_attention.k_layernorm.weight",
    "query_key_value": "linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "dense_h_to_4h": "linear_fc1",
    "dense_4h_to_h": "linear_fc2",
}
FUSED_NAMES = {
    "input_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "post_attention_norm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def _spelled(held: dict[str, Tensor], spelling: str, trunk: bool) -> dict[str, Tensor]:
    changes: dict[str, str] = {}
    if spelling == "layernorm":
        changes = {"_norm": "_layernorm", "self_attention.": "attention."}
    elif spelling == "fused":
        changes = {**CORE_NAMES, **FUSED_NAMES}
    elif spelling == "core":
        changes = CORE_NAMES
    if trunk:
        changes = {**changes, "mlp.": "mlp.trunk."}
    return {_replaced(key, changes): value for key, value in held.items()}


def _replaced(key: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        key = key.replace(old, new)
    return key


def _exit(exits: Exits, layer: int, cut: _Cut) -> dict[str, Tensor]:
    prefix = f"exits.{layer - exits.before}."
    if exits.body == "embedding":
        return {}
    held = {"exit_norm.weight": exits.tensors[f"{prefix}norm.weight"].clone()}
    if exits.body == "mlp":
        mlp = {key.removeprefix(prefix): value for key, value in exits.tensors.items() if key.startswith(prefix)}
        held |= {key.replace("mlp.", "mlp.branch."): value for key, value in _mlp(mlp, cut).items()}
    if exits.body == "layer":
        held |= {f"exit_block.{key}": value for key, value in _layer(exits.tensors, prefix, cut).items()}
    return held
