"""Loading and hashing a released model, against reading and hashing the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from megatron_ee import platform
from megatron_ee.benchmark.machine import seconds
from megatron_ee.checkpoint.loading import SavedModel, load_backbone, open_model
from megatron_ee.checkpoint.safetensors_file import tensor_bytes
from megatron_ee.config.untrusted import open_regular, read_exactly
from megatron_ee.model.setup import build_setup
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.groups import Groups, process_groups

BUFFER = 16 * 2**20
"""Bytes of the buffer that plain reading reuses: large enough for system calls not to count."""


@contextlib.contextmanager
def loading(directory: str, dtype: str | None, cache: str) -> Iterator[Loading]:
    """For a worker: the object below.

    Args:
        directory: the model.
        dtype: to load in; None takes what most of its bytes are stored in, so that nothing is converted.
        cache: directory for what hashing remembers, instead of the user's.

    Raises:
        CheckpointError: the model cannot be used.
    """
    os.environ["MEGATRON_EE_CACHE"] = cache
    with process_groups() as groups:
        yield Loading(open_model(directory), dtype, groups)


class Loading:
    """Each method does its work once and returns the seconds it took."""

    def __init__(self, model: SavedModel, dtype: str | None, groups: Groups) -> None:
        self._model, self._groups = model, groups
        stored: Counter[torch.dtype] = Counter()
        for entry in model.weights.values():
            stored[entry.dtype] += entry.nbytes
        self._stored = stored.most_common(1)[0][0]
        names = {value: name for name, value in platform.DTYPES.items()}
        self._dtype = dtype or names.get(self._stored, "bfloat16")
        self._files = sorted({file for entry in model.weights.values() for file in entry.files})
        self._buffer = torch.zeros(BUFFER, dtype=torch.uint8)

    def describe(self) -> dict[str, Any]:
        """What is read (``bytes``, ``tensors``, ``files``, dtypes stored and loaded), and the size of the buffer."""
        return {
            "bytes": sum(entry.nbytes for entry in self._model.weights.values()),
            "tensors": len(self._model.weights),
            "files": len(self._files),
            "buffer": BUFFER,
            "dtype": self._dtype,
            "stored_dtype": str(self._stored).removeprefix("torch."),
        }

    def load(self) -> float:
        """Open and check the directory, allocate the whole model, fill it."""
        return seconds(self._load)

    def _load(self) -> None:
        model = open_model(self._model.path)
        setup = build_setup(model.architecture, platform.DTYPES[self._dtype], self._groups)
        stage = Stage(setup, range(1, model.architecture.num_layers + 1), [], final_exit=True)
        load_backbone(stage, model)

    def read(self) -> float:
        """Read every byte of the same files into one buffer that is used again and again."""
        return seconds(self._read)

    def _read(self) -> None:
        buffer = tensor_bytes(self._buffer)
        for path in self._files:
            with open_regular(path) as fd:
                position = 0
                while count := os.preadv(fd, [buffer], position):
                    position += count

    def keep(self) -> float:
        """Read the same bytes into new memory, as whoever wants to keep them must: one allocation, one thread."""
        return seconds(self._keep)

    def _keep(self) -> None:
        memory = tensor_bytes(torch.empty(sum(path.stat().st_size for path in self._files), dtype=torch.uint8))
        start = 0
        for path in self._files:
            with open_regular(path) as fd:
                size = os.fstat(fd).st_size
                read_exactly(fd, memory[start : start + size], 0, path)
            start += size

    def hash(self) -> float:
        """The backbone's hash, from the files, whatever is remembered of it."""
        return seconds(lambda: self._model.digest(fresh=True))

    def sha256(self) -> float:
        """SHA-256 of the buffer, in memory, on one core."""
        return seconds(lambda: hashlib.sha256(tensor_bytes(self._buffer)).digest())
