"""The boxes of a released tensor on a tensor-parallel rank, from the tensor's name, without building a module."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_ee.checkpoint.manifest import Box
from megatron_ee.config.architecture import Architecture
from megatron_ee.families.registry import FAMILIES
from megatron_ee.families.weights import EMBEDDING, LM_HEAD, parameter_parts
from megatron_ee.parallel.costs import padded_vocab

_VOCABULARY = (EMBEDDING, LM_HEAD, "lm_head.b")


def rank_boxes(name: str, shape: Sequence[int], arch: Architecture, rank: int, size: int) -> list[Box]:
    """The boxes of a released or exit's tensor that tensor-parallel rank ``rank`` of ``size`` holds.

    Tensors that every rank holds whole are assigned to the first rank.

    Args:
        name: released name, or name of an exit's tensor in an adapter.
        shape: of the whole tensor.
        arch: of the model; ``size`` divides its key-value heads and MLP columns.
    """
    inner = re.sub(r"^(model\.layers|exits)\.\d+\.", "", name)
    if inner in _VOCABULARY:  # the vocabulary is padded, so the last ranks hold fewer real rows, or none
        rows = padded_vocab(arch.vocab_size, size) // size
        start = min(rows * rank, shape[0])
        count = min(rows, shape[0] - start)
        return [_rows(start, count, shape)] if count else []
    for parameter, source in FAMILIES[arch.family].layer.items():
        if inner not in source.names or source.kind == "whole":
            continue
        if source.kind == "columns":
            columns = shape[1] // size
            return [((0, columns * rank), (shape[0], columns))]
        if len(source.names) > 1:
            return [_rows(shape[0] // size * rank, shape[0] // size, shape)]
        parts = [part[0] for part in parameter_parts(arch)[parameter]]  # all in this tensor, one after another
        return [
            _rows(sum(parts[:index]) + rows // size * rank, rows // size, shape) for index, rows in enumerate(parts)
        ]
    return [((0,) * len(shape), tuple(shape))] if rank == 0 else []


def _rows(start: int, count: int, shape: Sequence[int]) -> Box:
    return (start, *(0 for _ in shape[1:])), (count, *shape[1:])
