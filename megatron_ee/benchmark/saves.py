"""Saves of a random state, on the spot and in the background, beside copying and writing the same bytes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ee import platform
from megatron_ee.benchmark.machine import SEED, seconds
from megatron_ee.checkpoint.atomic import write_all
from megatron_ee.checkpoint.safetensors_file import tensor_bytes
from megatron_ee.checkpoint.saving import Saver
from megatron_ee.checkpoint.writing import Piece, whole

MATRICES, COLUMNS, PRODUCT = 16, 1024, 768
BYTES_PER_WEIGHT = 2 + 2 + 2 * 4
"""Of bfloat16 weights, what makes float32 main weights of them, and two moments."""


@contextlib.contextmanager
def saves(directory: str, megabytes: int) -> Iterator[Saves]:
    """For a worker: the object below, which writes to ``directory``."""
    with Saver(asynchronous=True) as saver:
        yield Saves(Path(directory), megabytes, saver)


class Saves:
    """Each method does its work once and returns the seconds it took."""

    def __init__(self, directory: Path, megabytes: int, saver: Saver) -> None:
        self._directory, self._saver, self._number = directory, saver, 0
        rows = max(1, megabytes * 10**6 // (MATRICES * COLUMNS * BYTES_PER_WEIGHT))
        device, generator = platform.device(), torch.Generator().manual_seed(SEED)
        self._pieces: list[Piece] = []
        for number in range(MATRICES):
            weights = torch.randn(rows, COLUMNS, generator=generator).to(device)
            self._pieces.append(whole(f"exits.{number}", weights.bfloat16()))
            self._pieces.append(whole(f"optimizer.remainder.{number}", weights.short()))
            for kind in ("exp_avg", "exp_avg_sq"):
                self._pieces.append(whole(f"optimizer.{kind}.{number}", weights.clone()))
        self._copies = [torch.empty_like(piece.tensor, device="cpu") for piece in self._pieces]
        self._factor = torch.randn(PRODUCT, PRODUCT, device=device)

    def describe(self) -> dict[str, Any]:
        """Size of the state, and the machine."""
        device = torch.cuda.get_device_name() if platform.has_accelerator() else "cpu"
        return {
            "bytes": sum(copy.numel() * copy.element_size() for copy in self._copies),
            "tensors": len(self._copies),
            "machine": {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__},
        }

    def save(self, asynchronous: bool) -> dict[str, float]:
        """A checkpoint: ``stopped`` and ``writing`` as in ``SaveTimes``; ``product``: mean of a product meanwhile."""
        self._number += 1
        final = self._directory / f"step-{self._number}"
        self._saver.save(final, self._pieces, {}, wait=not asynchronous)
        products = []
        while not (finished := self._saver.finished()):
            self._saver.check()
            products.append(self.product())
        shutil.rmtree(final)
        (times,) = finished
        result = {"stopped": times.stopped, "writing": times.writing}
        return {**result, "product": sum(products) / len(products)} if products else result

    def product(self) -> float:
        """A product of matrices, which stands for tuning."""
        return seconds(lambda: torch.mm(self._factor, self._factor))

    def copy(self) -> float:
        """The state into memory that is there."""
        return seconds(self._copy)

    def _copy(self) -> None:
        for copy, piece in zip(self._copies, self._pieces, strict=True):
            copy.copy_(piece.tensor)

    def write(self) -> float:
        """What ``copy`` copied into a new file that is fsynced, and nothing else."""
        path = self._directory / "plain"
        elapsed = seconds(lambda: self._write(path))
        path.unlink()
        return elapsed

    def _write(self, path: Path) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for copy in self._copies:
                write_all(fd, tensor_bytes(copy))
            os.fsync(fd)
        finally:
            os.close(fd)
