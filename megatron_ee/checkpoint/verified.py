"""Reads a file with a known SHA-256 per block, and returns only verified bytes.

The hashed bytes are the returned bytes, so each block is read once. A block that is needed as a whole is read into its
destination and hashed there. Any other block is cached by the thread that verified it, for the next read.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_ee.checkpoint.digest import hash_range, hash_workers
from megatron_ee.checkpoint.manifest import BLOCK
from megatron_ee.checkpoint.safetensors_file import tensor_bytes
from megatron_ee.config.untrusted import read_exactly
from megatron_ee.errors import DamagedError


class _Kept(threading.local):
    """The last block that this thread read in parts. ``file`` is None while ``memory`` holds no valid block."""

    memory = memoryview(b"")
    file: VerifiedFile | None = None
    block = -1


@dataclass(eq=False)
class VerifiedFile:
    """One file of a checkpoint.

    Attributes:
        path: its path.
        size: its size in bytes.
        header_end: position of the first tensor's bytes.
        digests: SHA-256 (hex) of each ``BLOCK`` bytes.
    """

    path: Path
    size: int
    header_end: int
    digests: Sequence[str]
    _checked: set[int] = field(default_factory=set)
    _locks: list[threading.Lock] = field(init=False)

    def __post_init__(self) -> None:
        self._locks = [threading.Lock() for _ in self.digests]

    def read(self, fd: int, out: memoryview, position: int, tensor: str) -> None:
        """Fill ``out`` with the bytes from ``position``, several blocks in parallel. Thread-safe.

        Args:
            fd: descriptor of the file, open for reading.
            out: the destination.
            position: position in the file.
            tensor: name of the tensor, for messages.

        Raises:
            DamagedError: a block of these bytes, or the header, has changed.
        """
        for block in range(-(-self.header_end // BLOCK)):
            self._fill(fd, out[:0], 0, block, tensor)
        blocks = range(position // BLOCK, -(-(position + len(out)) // BLOCK))
        whole = [block for block in blocks if self._wants_all(block, position, len(out)) and block not in self._checked]
        others = [block for block in blocks if block not in whole]
        if len(whole) < 2:
            for block in blocks:
                self._fill(fd, out, position, block, tensor)
            return
        with ThreadPoolExecutor(min(hash_workers(), len(whole))) as pool:
            filling = [pool.submit(self._fill, fd, out, position, block, tensor) for block in whole]
            for block in others:  # in this thread, which caches the block for the next read
                self._fill(fd, out, position, block, tensor)
            for done in filling:
                done.result()

    def _wants_all(self, block: int, position: int, count: int) -> bool:
        return position <= block * BLOCK and min((block + 1) * BLOCK, self.size) <= position + count

    def _fill(self, fd: int, out: memoryview, position: int, block: int, tensor: str) -> None:
        """Fill the part of ``out`` that lies in one block, and verify the block if it is not verified yet."""
        start, stop = block * BLOCK, min((block + 1) * BLOCK, self.size)
        first = max(start, position)
        part = out[first - position : max(0, stop - position)]
        if not (_kept.file is self and _kept.block == block):
            with self._locks[block]:
                checked = block in self._checked
                if not checked and len(part) == stop - start:
                    self._check(fd, part, block, tensor)
                    return
                if not checked:
                    _kept.file = None  # invalid until it holds this block
                    if not _kept.memory:
                        _kept.memory = tensor_bytes(torch.empty(BLOCK, dtype=torch.uint8))
                    self._check(fd, _kept.memory[: stop - start], block, tensor)
                    _kept.file, _kept.block = self, block
            if checked:
                read_exactly(fd, part, first, self.path)
                return
        part[:] = _kept.memory[first - start : first - start + len(part)]

    def _check(self, fd: int, memory: memoryview, block: int, tensor: str) -> None:
        """Read a block into ``memory`` and verify it."""
        start, stop = block * BLOCK, block * BLOCK + len(memory)
        if hash_range(fd, start, stop, self.path, memory) != self.digests[block]:
            raise DamagedError(
                f"{self.path}: damaged between bytes {start} and {stop} (SHA-256 differs), in tensor {tensor!r}"
            )
        self._checked.add(block)


_kept = _Kept()
