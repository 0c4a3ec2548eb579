"""Maps this rank's part of each parameter to boxes of released tensors.

A parameter consists of one released tensor or of several fused ones: q, k and v by key-value group, or gate and up. The
*kind* of mapping describes how tensor parallelism shards them, so a family's table holds only names. ``blocks`` returns
the boxes of a parameter. Loading fills them and saving writes them, so one description serves both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import Source
from megatron_ee.families.weights import EMBEDDING, FINAL_NORM, head_name, layer_source
from megatron_ee.model.backbone import Backbone


@dataclass(frozen=True)
class Block:
    """A box of a released tensor, and the memory on this rank that holds it.

    Attributes:
        name: released name.
        shape: shape of the whole released tensor.
        offset: start of the box in it.
        tensor: view of the parameter, with the shape of the box.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


def backbone_sources(backbone: Backbone) -> Iterator[tuple[Tensor, Source]]:
    """Yield every parameter of the backbone on this rank once, with its source. Slots of layers are left out."""
    arch = backbone.setup.architecture
    if backbone.slots is None:
        for number, layer in backbone.numbered_layers():
            yield from layer_sources(arch, number, dict(layer.named_parameters()))
    for name, parameter in backbone.named_parameters():
        if name.startswith("layers."):
            continue
        if name == "final_norm.weight":
            yield parameter, Source((FINAL_NORM,), "whole")
        else:
            yield parameter, Source((EMBEDDING if name == "embedding.weight" else head_name(arch),), "vocabulary")


def layer_sources(arch: Architecture, number: int, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Source]]:
    """Yield each tensor of layer ``number`` with its source.

    Args:
        tensors: by the layer's parameter names.
    """
    for name, tensor in tensors.items():
        yield tensor, layer_source(arch, name, f"model.layers.{number - 1}")


def blocks(parameter: Tensor, source: Source, arch: Architecture, rank: int, size: int) -> list[Block]:
    """The boxes of released tensors that tensor-parallel rank ``rank`` of ``size`` holds in ``parameter``.

    ``parameter`` may also be another tensor of the same shape, such as optimizer state. Padding rows of the vocabulary
    belong to no block.
    """
    tensor = parameter.detach()
    name = source.names[0]
    if source.kind == "whole":
        return [Block(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor)]
    if source.kind == "columns":
        rows, columns = tensor.shape
        return [Block(name, (rows, columns * size), (0, columns * rank), tensor)]
    if source.kind == "rows":
        return [_rows(name, tensor, rank * len(tensor), size * len(tensor))]
    if source.kind == "vocabulary":
        start = rank * len(tensor)
        real = tensor[: max(0, arch.vocab_size - start)]
        return [_rows(name, real, start, arch.vocab_size)] if len(real) else []
    if source.kind == "gated":
        half = len(tensor) // 2
        parts = _parts(source, (half * size, half * size))
        return [
            _rows(name, part, start + rank * half, total)
            for (name, start, total), part in zip(parts, tensor.split(half), strict=True)
        ]
    return list(_qkv_blocks(tensor, source, arch, rank, size))


def _rows(name: str, tensor: Tensor, start: int, total: int) -> Block:
    return Block(name, (total, *tensor.shape[1:]), (start,) + (0,) * (tensor.ndim - 1), tensor)


def _parts(source: Source, rows: Sequence[int]) -> list[tuple[str, int, int]]:
    """For each part of ``rows`` rows: released name, first row, and number of rows of the released tensor."""
    if len(source.names) == len(rows):
        return [(name, 0, count) for name, count in zip(source.names, rows, strict=True)]
    (name,) = source.names
    return [(name, sum(rows[:index]), sum(rows)) for index in range(len(rows))]


def _qkv_blocks(tensor: Tensor, source: Source, arch: Architecture, rank: int, size: int) -> Iterator[Block]:
    """Blocks of each key-value group: its query heads, its key, and its value."""
    groups, dim = arch.num_kv_heads // size, arch.head_dim
    heads = (arch.num_heads // arch.num_kv_heads, 1, 1)
    parts = _parts(source, [arch.num_kv_heads * count * dim for count in heads])
    for local, fused in enumerate(tensor.chunk(groups)):
        group = rank * groups + local
        runs = fused.split([count * dim for count in heads])
        for (name, start, total), rows, count in zip(parts, runs, heads, strict=True):
            yield _rows(name, rows, start + group * count * dim, total)
