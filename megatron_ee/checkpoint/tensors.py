"""A tensor that is stored in a file or computed from stored tensors, and is read on demand, box by box."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ee.checkpoint.safetensors_file import PIECE, TensorEntry, read_box, tensor_bytes

READERS = 2
"""Number of reading threads: enough to keep a disk busy, few enough to keep the buffers small."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint of any format. It is not in memory.

    Attributes:
        dtype: stored dtype.
        shape: shape of the whole tensor.
        read: reads a box into its first argument (any strides and device; floating dtypes are converted). The second
            argument is the start of the box, one index per dimension. Thread-safe.
        files: the files that it is read from; used to detect a changed checkpoint.
        made: description of its computation from these files, if it is not stored directly. Equal descriptions mean
            equal values.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[Tensor, Sequence[int]], None]
    files: tuple[Path, ...]
    made: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def slabs(self, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Yield a box (by default the whole tensor) as contiguous runs of rows of at most ``PIECE`` bytes.

        A single row may be larger. Each run is overwritten by the next.

        Raises:
            CheckpointError: a file cannot be read.
        """
        offset = (0,) * len(self.shape) if offset is None else tuple(offset)
        shape = self.shape if shape is None else tuple(shape)
        if not shape:
            scalar = torch.empty((), dtype=self.dtype)
            self.read(scalar, ())
            yield scalar.view(1)
            return
        if 0 in shape:
            return  # its other sizes may be impossibly large
        row = math.prod(shape[1:]) * self.dtype.itemsize
        rows = max(1, min(shape[0], PIECE // row))
        buffer = torch.empty((rows, *shape[1:]), dtype=self.dtype)
        for first in range(0, shape[0], rows):
            slab = buffer[: min(rows, shape[0] - first)]
            self.read(slab, (offset[0] + first, *offset[1:]))
            yield slab

    def sha256(self) -> str:
        """SHA-256 (hex) of its bytes, row-major, in its dtype. Raises CheckpointError if it cannot be read."""
        digest = hashlib.sha256()
        for slab in self.slabs():
            digest.update(tensor_bytes(slab))
        return digest.hexdigest()


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors are equal: bit by bit if their dtypes are equal, else in float64.

    Both are read a few MiB at a time, up to the first difference.

    Raises:
        CheckpointError: a tensor cannot be read, or the dtypes differ and are not both floating.
    """
    if first.shape != second.shape:
        return False
    dtype = first.dtype if first.dtype == second.dtype else torch.float64
    slabs = [dataclasses.replace(tensor, dtype=dtype).slabs() for tensor in (first, second)]
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*slabs, strict=True))


def stored(entry: TensorEntry) -> StoredTensor:
    """A tensor of a safetensors file."""
    return StoredTensor(entry.dtype, entry.shape, lambda out, offset: read_box(entry, out, offset), (entry.path,))
