"""Which box of a released tensor a tensor-parallel rank holds, by the tensor's name alone: no module is built."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_ee.checkpoint.manifest import Box
from megatron_ee.config.architecture import Architecture
from megatron_ee.model.names import EMBEDDING, LAYER, LM_HEAD, Kind
from megatron_ee.parallel.costs import padded_vocab

_CUTS: dict[str, Kind] = {released: kind for names, kind in LAYER.values() for released in names}
_VOCABULARY = (EMBEDDING, LM_HEAD, "lm_head.b")


def rank_box(name: str, shape: Sequence[int], arch: Architecture, rank: int, size: int) -> Box | None:
    """What tensor-parallel rank ``rank`` of ``size`` holds of a released or exit's tensor, as a box of it.

    What every rank holds whole is given to the first; None is nothing.

    Args:
        name: released name, or an exit's tensor as its adapter names it.
        shape: of the whole tensor.
        arch: of the model; ``size`` divides its key-value heads and MLP columns.
    """
    kind = _kind(name)
    if kind == "whole":
        return ((0,) * len(shape), tuple(shape)) if rank == 0 else None
    if kind == "columns":
        columns = shape[1] // size
        return (0, columns * rank), (shape[0], columns)
    # Rows of q, k, v, gate and up are cut evenly; those of the vocabulary, which the ranks pad, are not.
    rows = padded_vocab(arch.vocab_size, size) // size if kind == "vocabulary" else shape[0] // size
    start = min(rows * rank, shape[0])
    count = min(rows, shape[0] - start)
    return ((start, *(0 for _ in shape[1:])), (count, *shape[1:])) if count else None


def _kind(name: str) -> Kind:
    inner = re.sub(r"^(model\.layers|exits)\.\d+\.", "", name)
    return _CUTS.get(inner, "vocabulary" if inner in _VOCABULARY else "whole")
