"""Reads a file of ``torch.save`` with many tensors: no code is run, and tensors are read on demand."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ee.checkpoint.safetensors_file import TensorEntry, read_box
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.untrusted import open_regular
from megatron_ee.errors import CheckpointError, DamagedError, shown
from megatron_ee.importers.megatron.archive import Archive, check_sum, damage, parse_tensor
from megatron_ee.importers.megatron.guarded import Inert, unpickle

_PARAMETER = ("torch._utils", "_rebuild_parameter")


@dataclass
class _Storage:
    """Location of a storage's bytes. The checksum is verified once, before the first read."""

    path: Path
    offset: int
    nbytes: int
    crc: int
    checked: bool
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, where: str) -> None:
        with self.lock:
            if not self.checked:
                with open_regular(self.path) as fd:
                    check_sum(fd, self.offset, self.nbytes, self.crc, self.path, where)
                self.checked = True


class TorchFile:
    """A file of ``torch.save``.

    Attributes:
        path: the file.
        content: the saved object, as ``guarded.unpickle`` gives it; see ``tensor`` for tensors in it.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """Read everything except tensors.

        Args:
            path: the file.
            verify: check the CRC-32 of a storage before the first read from it.

        Raises:
            CheckpointError: it cannot be opened, or was written before torch 1.6.
            DamagedError: truncated or malformed.
        """
        self.path = path
        with open_regular(path) as fd, damage(str(path)):
            start = os.pread(fd, 8, 0)
            if start == b"version ":
                raise DamagedError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull`")
            if not start.startswith(b"PK\x03\x04"):
                raise CheckpointError(
                    f"{path}: is not a zip archive, which torch.save writes since torch 1.6; load it in the program "
                    "that wrote it, and save it again with a recent torch"
                )
            archive = Archive(fd, 0, os.fstat(fd).st_size)
            if archive.has("byteorder") and archive.content("byteorder") != sys.byteorder.encode():
                raise CheckpointError(f"{path}: written in another byte order than this machine's; convert it there")
            self.content = unpickle(archive.content("data.pkl"), str(path), load_storage=lambda pid: pid)
            places = {name: archive.place(name) for name in archive.names() if name.startswith("data/")}
        self._storages = {
            name: _Storage(path, offset, nbytes, crc, checked=not (verify and crc))
            for name, (offset, nbytes, crc) in places.items()
        }

    def tensor(self, value: Any, name: str) -> StoredTensor:
        """A tensor in the content.

        Args:
            value: the part of the content that should be one.
            name: its name, for messages.

        Raises:
            CheckpointError: it is not a contiguous tensor of a known dtype.
            DamagedError: it is not inside its storage.
        """
        where = f"{self.path}: tensor {shown(name)}"
        if isinstance(value, Inert) and value.origin == _PARAMETER and value.args:
            value = value.args[0]
        with damage(where):
            dtype, key, first, shape = parse_tensor(value, where)
            storage = self._storages[f"data/{key}"]
        nbytes = math.prod(shape) * dtype.itemsize
        if first * dtype.itemsize + nbytes > storage.nbytes:
            raise DamagedError(f"{where}: shape {list(shape)} of {dtype} does not fit {storage.nbytes} bytes")
        entry = TensorEntry(name, dtype, shape, self.path, storage.offset + first * dtype.itemsize, nbytes)

        def read(out: Tensor, offset: Sequence[int]) -> None:
            storage.check(where)
            read_box(entry, out, offset)

        return StoredTensor(dtype, shape, read, (self.path,))
