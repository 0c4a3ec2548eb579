"""Tensors that consist of runs of rows of other tensors, for fusing, splitting and padding."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_ee.checkpoint.tensors import StoredTensor


@dataclass(frozen=True)
class Run:
    """``count`` rows of ``tensor`` from row ``first``."""

    tensor: StoredTensor
    first: int
    count: int


def join_rows(runs: Sequence[Run], made: str) -> StoredTensor:
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


def take_layer(stacked: StoredTensor, index: int) -> StoredTensor:
    """Tensor ``index`` of a stack along a leading axis."""

    def read(out: Tensor, offset: Sequence[int]) -> None:
        stacked.read(out.unsqueeze(0), (index, *offset))

    return StoredTensor(stacked.dtype, stacked.shape[1:], read, stacked.files, f"{stacked.made}[{index}]")
