"""The name table between megatron-core's ``GPTModel`` and released models, used in both directions.

A Megatron tensor consists of one released tensor or of several fused ones. ``row_runs`` maps its rows to rows of these.
Import splits it (``released_parts``), and export fuses it (``fuse``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_ee.checkpoint.derived import Rows, constant, join_rows
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.architecture import Architecture
from megatron_ee.errors import CheckpointError
from megatron_ee.families.family import LLAMA_LAYER, Source
from megatron_ee.families.weights import EMBEDDING, FINAL_NORM, LM_HEAD, expected_tensors
from megatron_ee.importers.megatron.legacy_names import CORE_FUSED, CORE_LAYER

CORE = {**CORE_LAYER, **CORE_FUSED}
SPLIT = {
    "mlp.linear_fc1.weight_w": "mlp.gate_proj.weight",
    "mlp.linear_fc1.weight_v": "mlp.up_proj.weight",
    "mlp.linear_fc1.bias_w": "mlp.gate_proj.bias",
    "mlp.linear_fc1.bias_v": "mlp.up_proj.bias",
}
"""Separate gate and up, as in checkpoints with ``singleton_local_shards``."""
EMBEDDING_KEY = "embedding.word_embeddings.weight"
MODEL = {
    EMBEDDING_KEY: Source((EMBEDDING,), "vocabulary"),
    "decoder.final_layernorm.weight": Source((FINAL_NORM,), "whole"),
    "output_layer.weight": Source((LM_HEAD,), "vocabulary"),
}
RENAMED = {"input_layernorm.weight", "pre_mlp_layernorm.weight"}
"""Separate norms, which ``GPTModel`` saves under the names of norms that are fused into the next linear layer."""
LAYERS = "decoder.layers"
_LAYER_KEY = re.compile(r"decoder\.layers\.(?:(0|[1-9]\d{0,4})\.)?(.+)")


@dataclass(frozen=True)
class Parameter:
    """A tensor of a checkpoint of ``GPTModel``.

    Attributes:
        key: key in a checkpoint.
        sources: its released tensors, with full names: one source, or one per layer.
        stacked: whether the tensors of all layers are stacked under the key, along a leading axis.
    """

    key: str
    sources: tuple[Source, ...]
    stacked: bool


def parse_key(key: str, num_layers: int) -> Parameter | None:
    """The parameter of a Megatron key; None if the key is not in the tables.

    Args:
        key: without a ``module.`` or ``model.`` prefix.
        num_layers: of the model.
    """
    if key in MODEL:
        return Parameter(key, (MODEL[key],), False)
    match = _LAYER_KEY.fullmatch(key)
    if match is None or (match[2] not in CORE and match[2] not in SPLIT):
        return None
    layers = range(num_layers) if match[1] is None else [int(match[1])]
    return Parameter(key, tuple(_layer_source(match[2], layer) for layer in layers), match[1] is None)


def _layer_source(inner: str, layer: int) -> Source:
    """The source of a layer's parameter. Every family that Megatron supports has Llama's names."""
    source = Source((SPLIT[inner],), "whole") if inner in SPLIT else LLAMA_LAYER[CORE[inner]]
    return Source(tuple(f"model.layers.{layer}.{name}" for name in source.names), source.kind)


def row_runs(
    source: Source, shapes: Mapping[str, tuple[int, ...]], arch: Architecture
) -> Iterator[tuple[str, int, int]]:
    """Yield the runs of rows of a Megatron tensor, in order: released name, first row, number of rows.

    Verified against megatron-core 0.16.1: ``linear_qkv`` is, for each key-value group, its query heads, its key and its
    value (``SelfAttention.get_query_key_value_tensors``); ``linear_fc1`` of the whole model, for every tensor-parallel
    size, is all of gate, then all of up (``apply_swiglu_sharded_factory``).
    """
    if source.kind != "qkv":
        yield from ((name, 0, shapes[name][0]) for name in source.names)
        return
    heads = (arch.num_heads // arch.num_kv_heads, 1, 1)
    for group in range(arch.num_kv_heads):
        for name, count in zip(source.names, heads, strict=True):
            yield name, group * count * arch.head_dim, count * arch.head_dim


def fused_shape(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of a Megatron tensor, without padding rows of the vocabulary."""
    return sum(shapes[name][0] for name in source.names), *shapes[source.names[0]][1:]


def released_parts(
    source: Source, fused: StoredTensor, shapes: Mapping[str, tuple[int, ...]], arch: Architecture
) -> dict[str, StoredTensor]:
    """Split a Megatron tensor into released tensors, by name.

    Args:
        source: with full released names.
        fused: the Megatron tensor, of ``fused_shape``; it may have more rows for the vocabulary.
        shapes: of the released tensors.
        arch: of the model.
    """
    if fused.shape == shapes[source.names[0]]:
        return {source.names[0]: fused}
    runs: dict[str, list[Rows]] = {name: [] for name in source.names}
    row = 0
    for name, first, count in row_runs(source, shapes, arch):
        assert first == sum(run.count for run in runs[name]), "the runs of a released tensor come in its order"
        runs[name].append(Rows(fused, row, count))
        row += count
    how = f"{source.kind}, {arch.num_heads} heads in {arch.num_kv_heads} groups"
    return {name: join_rows(found, f"{name} of {fused.made} ({how})") for name, found in runs.items()}


def fuse(source: Source, backbone: Mapping[str, StoredTensor], arch: Architecture, rows: int = 0) -> StoredTensor:
    """Fuse released tensors into a Megatron tensor; the inverse of ``released_parts``.

    Args:
        source: with full released names.
        backbone: every released tensor.
        arch: of the model.
        rows: pad with zeros to at least this number of rows.

    Raises:
        CheckpointError: the tensors differ in dtype.
    """
    shapes = {name: backbone[name].shape for name in source.names}
    if len({backbone[name].dtype for name in source.names}) > 1:
        found = ", ".join(f"{name} is {backbone[name].dtype}" for name in source.names)
        raise CheckpointError(f"{found}: Megatron fuses them; convert them to one dtype first")
    runs = [Rows(backbone[name], first, count) for name, first, count in row_runs(source, shapes, arch)]
    like, total = backbone[source.names[0]], fused_shape(source, shapes)[0]
    if rows > total:
        runs.append(Rows(constant(0, (rows - total, *like.shape[1:]), like.dtype), 0, rows - total))
    parts = ", ".join(f"{name} {backbone[name].made}".strip() for name in source.names)
    return join_rows(runs, f"{source.kind} of {parts} ({arch.num_heads} heads in {arch.num_kv_heads} groups)")


def parameters(arch: Architecture) -> Iterator[Parameter]:
    """Yield every parameter of a model, with the default keys of ``GPTModel.sharded_state_dict``."""
    expected = expected_tensors(arch)
    for key, source in MODEL.items():
        if source.names[0] in expected:
            yield Parameter(key, (source,), False)
    for inner in CORE:
        sources = tuple(_layer_source(inner, layer) for layer in range(arch.num_layers))
        if inner not in RENAMED and sources[0].names[0] in expected:
            yield Parameter(f"{LAYERS}.{inner}", sources, True)
