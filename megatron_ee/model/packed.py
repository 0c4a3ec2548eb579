"""Quantised matrices in memory, and their expansion to the dtype that layers compute in.

All formats of quantised releases become this one: codes of 4 or 8 bits, a scale per block, maybe a zero point. An
element is ``(code - zero) * scale``, computed in the scale's dtype, as the formats' own libraries do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PIECE = 2**20
"""Elements expanded at a time by default: codes, scales and results stay in a CPU cache."""


@dataclass(frozen=True)
class Grid:
    """The blocks of a matrix that share a scale.

    Attributes:
        rows: rows of a block.
        columns: columns of a block.
        first_row: position of the matrix's first row in its block.
        first_column: position of its first column in its block.
    """

    rows: int
    columns: int
    first_row: int = 0
    first_column: int = 0


@dataclass(frozen=True)
class PackedMatrix:
    """A quantised matrix ``[rows, columns]``, or a box of one.

    Attributes:
        codes: uint8, int8 or float8 ``[rows, columns]``. Of 4 bits: uint8 ``[rows, ceil(columns / 2)]``, the first of
            two in the low half of a byte.
        columns: number of columns.
        bits: of a code.
        scale: ``[blocks, blocks]``, of the blocks that the matrix touches.
        zero: subtracted from codes: like ``scale``, or one number for all.
        grid: the blocks.
        order: int32 ``[columns]``, the column of ``scale`` of each column; None if blocks are contiguous.
    """

    codes: Tensor
    columns: int
    bits: int
    scale: Tensor
    zero: Tensor | float
    grid: Grid
    order: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def to(self, device: torch.device) -> PackedMatrix:
        """The matrix on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def expand(self, out: Tensor, first: int = 0, elements: int = PIECE) -> None:
        """Write rows from ``first`` on into ``out``.

        Args:
            out: ``[rows, columns]`` or ``[runs, rows, columns]``, whose runs are consecutive rows. Floating, with any
                strides.
            first: the first row.
            elements: expanded at a time.
        """
        rows = math.prod(out.shape[:-1])
        if rows * self.columns <= elements or rows == 1:
            self._expand(out, first, rows)
            return
        inner = rows // len(out)
        step = max(1, elements // (inner * self.columns))
        for start in range(0, len(out), step):
            part = out[start] if step == 1 and out.ndim > 2 else out[start : start + step]
            self.expand(part, first + start * inner, elements)

    def _expand(self, out: Tensor, first: int, rows: int) -> None:
        values = (
            out if out.dtype == self.scale.dtype else torch.empty(out.shape, dtype=self.scale.dtype, device=out.device)
        )
        codes = self.codes[first : first + rows].view(*out.shape[:-1], -1)
        if self.bits == 4:
            values[..., 0::2] = codes & 15
            values[..., 1::2] = (codes >> 4)[..., : self.columns // 2]
        else:
            values.copy_(codes)
        lead = out.shape[:-1] if len(self.scale) > 1 else (1,) * (out.ndim - 1)
        scale = self._of_rows(self.scale, first, rows).view(*lead, -1)
        zero = self._of_rows(self.zero, first, rows).view(*lead, -1) if isinstance(self.zero, Tensor) else self.zero
        for columns, blocks in self._runs():
            part = values[..., columns]
            if self.order is None:
                part = part.unflatten(-1, (blocks.stop - blocks.start, -1))
            if isinstance(zero, Tensor):
                part.sub_(self._of_columns(zero, blocks))
            elif zero:
                part.sub_(zero)
            part.mul_(self._of_columns(scale, blocks))
        if values is not out:
            out.copy_(values)

    def _of_rows(self, blocks: Tensor, first: int, rows: int) -> Tensor:
        """Scales or zero points of some rows, ``[rows, blocks]``; ``[1, blocks]`` if all rows share them."""
        if len(blocks) == 1:
            return blocks
        if self.grid.rows == 1:
            return blocks[first : first + rows]
        start = self.grid.first_row + first
        return blocks[torch.arange(start, start + rows, device=blocks.device) // self.grid.rows]

    def _of_columns(self, blocks: Tensor, run: slice) -> Tensor:
        """Scales or zero points ``[..., blocks]`` in a shape that fits the columns of a run of blocks."""
        return blocks[..., run, None] if self.order is None else blocks[..., self.order]

    def _runs(self) -> Iterator[tuple[slice, slice]]:
        """Runs of columns that consist of equal blocks, and these blocks: a cut first block, whole ones, a cut last."""
        size, first = self.grid.columns, self.grid.first_column
        if self.order is not None or self.scale.shape[1] == 1:
            yield slice(0, self.columns), slice(0, 1)
            return
        start, block = 0, 0
        if first:
            start, block = min(size - first, self.columns), 1
            yield slice(0, start), slice(0, 1)
        whole = (self.columns - start) // size
        if whole:
            yield slice(start, start + whole * size), slice(block, block + whole)
        if start + whole * size < self.columns:
            yield slice(start + whole * size, self.columns), slice(block + whole, block + whole + 1)


def join_halves(codes: Tensor) -> Tensor:
    """Codes of 4 bits, uint8 ``[rows, columns]`` -> two in a byte, ``[rows, ceil(columns / 2)]``."""
    joined = codes[:, 0::2].clone()
    joined[:, : codes.shape[1] // 2] |= codes[:, 1::2] << 4
    return joined
