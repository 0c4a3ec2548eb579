"""Tensors computed on demand: copies, constants, random values, and parts and products of stored tensors.

Values are computed in tiles of whole rows, whose bounds depend only on the shape. So a value does not depend on the box
in which it is read.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ee.checkpoint.tensors import StoredTensor

DRAWN_TILE, PRODUCT_TILE = 2**20, 2**22  # elements, float32
SMALLEST_DRAW = 16
"""torch's ``normal_`` draws this many values at a time; it draws fewer values differently."""


def copied(name: str, tensor: StoredTensor) -> StoredTensor:
    """A copy of the tensor ``name``, for use under another name."""
    return dataclasses.replace(tensor, made=_described(name, tensor))


def constant(value: float, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    """A tensor whose elements are all ``value``."""

    def read(out: Tensor, offset: Sequence[int]) -> None:
        _check_box(out, offset, shape)
        out.fill_(value)

    return StoredTensor(dtype, shape, read, (), f"{value}")


def normal(seed: int, std: float, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    """Normal(0, std) of at least 2 dimensions, equal to ``torch.empty(shape).normal_(0, std)`` with ``seed``.

    Drawing is sequential, so the generator's state is kept for each tile reached so far: 5 KB per 4 MiB of values.
    """
    bounds = _tile_bounds(shape, DRAWN_TILE)
    states = {0: torch.Generator().manual_seed(seed).get_state()}  # by tile, before it

    def compute(tile: int) -> Tensor:
        known = next(index for index in range(tile, -1, -1) if index in states)
        generator = torch.Generator()
        generator.set_state(states[known])
        for index in range(known, tile + 1):
            values = torch.empty((bounds[index + 1] - bounds[index], *shape[1:])).normal_(0, std, generator=generator)
            states.setdefault(index + 1, generator.get_state())
        return values

    return StoredTensor(dtype, shape, _tiled(shape, dtype, bounds, compute), (), f"normal(0, {std!r}) of seed {seed}")


def low_rank_sum(
    base: tuple[str, StoredTensor], up: tuple[str, StoredTensor], down: tuple[str, StoredTensor], dtype: torch.dtype
) -> StoredTensor:
    """``base + up @ down``, computed in float32: the effective weight of a ``low_rank`` head.

    Each argument is a name and a tensor.

    Args:
        base: the frozen head W0, ``[vocab, hidden]``.
        up: B, ``[vocab, rank]``.
        down: A, ``[rank, hidden]``.
        dtype: of the result.
    """
    w0, b, a = base[1], up[1], down[1]
    bounds = _tile_bounds(w0.shape, PRODUCT_TILE)

    def compute(tile: int) -> Tensor:
        start, stop = bounds[tile : tile + 2]
        return _rows(w0, start, stop).addmm_(_rows(b, start, stop), _rows(a, 0, a.shape[0]))

    files = tuple(dict.fromkeys((*w0.files, *b.files, *a.files)))
    made = f"{_described(*base)} + {_described(*up)} @ {_described(*down)}"
    return StoredTensor(dtype, w0.shape, _tiled(w0.shape, dtype, bounds, compute), files, made)


@dataclass(frozen=True)
class Rows:
    """``count`` rows of ``tensor`` from row ``first``."""

    tensor: StoredTensor
    first: int
    count: int


def join_rows(runs: Sequence[Rows], made: str) -> StoredTensor:
    """The tensor of the concatenated rows of ``runs``. All other dimensions must be equal.

    Args:
        runs: at least one.
        made: description of the tensor; see ``StoredTensor``.
    """
    ends = list(itertools.accumulate(run.count for run in runs))

    def read(out: Tensor, offset: Sequence[int]) -> None:
        row, stop = offset[0], offset[0] + len(out)
        assert 0 <= row and stop <= ends[-1], "a box must be inside the tensor"
        index = bisect.bisect_right(ends, row)
        while row < stop:
            run, count = runs[index], min(ends[index], stop) - row
            within = run.first + row - (ends[index] - run.count)
            run.tensor.read(out[row - offset[0] : row - offset[0] + count], (within, *offset[1:]))
            row, index = row + count, index + 1

    files = tuple(dict.fromkeys(file for run in runs for file in run.tensor.files))
    like = runs[0].tensor
    return StoredTensor(like.dtype, (ends[-1], *like.shape[1:]), read, files, made)


def join_columns(parts: Sequence[StoredTensor], made: str) -> StoredTensor:
    """The matrix of the concatenated columns of ``parts``, which all have the same shape."""
    rows, width = parts[0].shape

    def read(out: Tensor, offset: Sequence[int]) -> None:
        start, stop = offset[1], offset[1] + out.shape[1]
        for rank in range(start // width, -(-stop // width)):
            first, end = max(start, rank * width), min(stop, (rank + 1) * width)
            parts[rank].read(out[:, first - start : end - start], (offset[0], first - rank * width))

    files = tuple(file for part in parts for file in part.files)
    return StoredTensor(parts[0].dtype, (rows, width * len(parts)), read, files, made)


def take_layer(stacked: StoredTensor, index: int) -> StoredTensor:
    """Tensor ``index`` of a stack along a leading axis."""

    def read(out: Tensor, offset: Sequence[int]) -> None:
        stacked.read(out.unsqueeze(0), (index, *offset))

    return StoredTensor(stacked.dtype, stacked.shape[1:], read, stacked.files, f"{stacked.made}[{index}]")


def _described(name: str, tensor: StoredTensor) -> str:
    return f"{name} ({tensor.made})" if tensor.made else name


def _rows(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows of a matrix in float32."""
    rows = torch.empty((stop - start, *tensor.shape[1:]))
    tensor.read(rows, (start,) + (0,) * (len(tensor.shape) - 1))
    return rows


def _tile_bounds(shape: Sequence[int], elements: int) -> list[int]:
    """First row of each tile of about ``elements`` elements, then the number of rows.

    Every tile except the last has a multiple of ``SMALLEST_DRAW`` elements, and the last of several has at least that
    many.
    """
    row = math.prod(shape[1:])
    starts = list(range(0, shape[0], SMALLEST_DRAW * max(1, elements // SMALLEST_DRAW // row)))
    if len(starts) > 1 and (shape[0] - starts[-1]) * row < SMALLEST_DRAW:
        starts.pop()
    return [*starts, shape[0]]


def _tiled(
    shape: Sequence[int], dtype: torch.dtype, bounds: Sequence[int], compute: Callable[[int], Tensor]
) -> Callable[[Tensor, Sequence[int]], None]:
    """Make the ``read`` of a tensor from ``compute``, which returns tile i: rows ``bounds[i]`` to ``bounds[i + 1]``,
    float32."""

    def read(out: Tensor, offset: Sequence[int]) -> None:
        _check_box(out, offset, shape)
        first, end = offset[0], offset[0] + out.shape[0]
        inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], out.shape[1:], strict=True))
        for tile in range(bisect.bisect_right(bounds, first) - 1, bisect.bisect_left(bounds, end)):
            start, stop = max(first, bounds[tile]), min(end, bounds[tile + 1])
            part = compute(tile)[(slice(start - bounds[tile], stop - bounds[tile]), *inner)]
            out[start - first : stop - first].copy_(part.to(dtype))

    return read


def _check_box(out: Tensor, offset: Sequence[int], shape: Sequence[int]) -> None:
    inside = all(0 <= o and o + n <= whole for o, n, whole in zip(offset, out.shape, shape, strict=True))
    assert inside, f"a box of shape {list(out.shape)} at {list(offset)} is not inside shape {list(shape)}"
