"""Locates the bytes of a tensor in a file of ``torch.save``: a zip archive, stored without compression.

Any box of the tensor can then be read directly from the file. ``torch.load`` would read all of it into memory, and
could be made to run code.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ee.checkpoint.safetensors_file import PIECE, TensorEntry, scratch_buffer, tensor_bytes
from megatron_ee.config.untrusted import open_regular, read_exactly
from megatron_ee.errors import CheckpointError, DamagedError, shown
from megatron_ee.importers.megatron.guarded import MAX_PICKLE, Inert, unpickle

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
REBUILD = ("torch._utils", "_rebuild_tensor_v2")
_KNOWN = (".".join(REBUILD), "collections.OrderedDict", *(f"torch.{name}" for name in STORAGES))


class _Window(io.RawIOBase):
    """``length`` bytes of an open file from ``start``, as a file object."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        super().__init__()
        self._fd, self._start, self._length, self._position = fd, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a position before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._fd, [view], self._start + self._position)
        self._position += count
        return count


def locate_tensor(path: Path, start: int, length: int, name: str, *, verify: bool) -> TensorEntry:
    """Locate the tensor that ``torch.save`` wrote to ``length`` bytes of ``path`` from ``start``.

    Args:
        path: the file.
        start: position of the archive in it.
        length: size of the archive.
        name: name of the tensor, for messages.
        verify: read the tensor once and verify its checksum. ``torch.save`` writes a CRC-32 by default.

    Raises:
        CheckpointError: it is not such a tensor, or it is not contiguous.
        DamagedError: it is truncated or malformed, or the checksum differs.
    """
    where = f"{path}: tensor {shown(name)}"
    with open_regular(path) as fd, damage(where):
        archive = Archive(fd, start, length)
        dtype, key, first, shape = parse_tensor(unpickle(archive.content("data.pkl"), where, _reference, _KNOWN), where)
        if archive.has("byteorder") and archive.content("byteorder") != b"little":
            raise CheckpointError(f"{where}: written in another byte order than this machine's; convert it there")
        offset, size, crc = archive.place(f"data/{key}")
        nbytes = math.prod(shape) * dtype.itemsize
        if first * dtype.itemsize + nbytes > size:
            raise DamagedError(f"{where}: shape {list(shape)} of {dtype} does not fit {size} bytes")
        if verify and crc:
            check_sum(fd, offset, size, crc, path, where)
    return TensorEntry(name, dtype, shape, path, offset + first * dtype.itemsize, nbytes)


def _reference(pid: Any) -> Any:
    """The persistent id of a storage in a pickle: ``("storage", type, key, device, number of elements)``."""
    return pid


@contextlib.contextmanager
def damage(where: str) -> Iterator[None]:
    """Convert errors from reading a damaged archive to a ``DamagedError`` of one line."""
    try:
        yield
    except CheckpointError:
        raise
    except (
        zipfile.BadZipFile,
        struct.error,
        ArithmeticError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise DamagedError(f"{where}: damaged: {type(error).__name__} {error}; copy the file again") from None


class Archive:
    """The members of a zip archive that is ``length`` bytes of an open file from ``start``."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        self._fd, self._start, self._length = fd, start, length
        with zipfile.ZipFile(io.BufferedReader(_Window(fd, start, length), 4096)) as archive:
            members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile("not one object as torch.save writes it")
        folder = pickles[0].removesuffix("data.pkl")
        self._members = {name.removeprefix(folder): info for name, info in members.items()}

    def has(self, name: str) -> bool:
        """Whether the member exists."""
        return name in self._members

    def names(self) -> Iterator[str]:
        """Names of all members, relative to the archive's one folder."""
        return iter(self._members)

    def place(self, name: str) -> tuple[int, int, int]:
        """Position of a member's bytes in the file, their number, and their CRC-32 (0 if none was written)."""
        info = self._members[name]
        header = os.pread(self._fd, 30, self._start + info.header_offset)
        if len(header) < 30 or header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"no stored member {name!r}")
        # The header's length is only in the header itself, not in the archive's directory.
        lengths = (int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little"))
        position = info.header_offset + 30 + sum(lengths)
        if info.compress_size != info.file_size or position + info.file_size > self._length:
            raise zipfile.BadZipFile(f"member {name!r} ends outside")
        return self._start + position, info.file_size, info.CRC

    def content(self, name: str) -> bytes:
        """Content of a small member. ``zipfile`` itself refuses archives that were written without checksums."""
        offset, size, crc = self.place(name)
        if size > MAX_PICKLE:
            raise zipfile.BadZipFile(f"member {name!r} is too large")
        data = os.pread(self._fd, size, offset)
        if len(data) != size or (crc and zlib.crc32(data) != crc):
            raise zipfile.BadZipFile(f"checksum of {name!r}")
        return data


def parse_tensor(found: Any, where: str) -> tuple[torch.dtype, str, int, tuple[int, ...]]:
    """Dtype, storage key, first element and shape of a pickled tensor."""
    if not isinstance(found, Inert) or found.origin != REBUILD or len(found.args) < 4:
        raise CheckpointError(f"{where}: not a plain tensor of a known dtype")
    pid, first, shape, stride = found.args[:4]
    storage, key = (pid[1], pid[2]) if isinstance(pid, tuple) and len(pid) == 5 else (None, None)
    module, kind = getattr(storage, "origin", ("", ""))
    dtype = STORAGES.get(kind) if module == "torch" else None
    numbers = (first, *shape, *stride)
    if dtype is None or not isinstance(key, str) or any(type(each) is not int or each < 0 for each in numbers):
        raise DamagedError(f"{where}: not a tensor as torch.save writes it")
    step = 1
    for extent, distance in zip(reversed(shape), reversed(stride), strict=True):
        if extent != 1 and distance != step:
            raise CheckpointError(f"{where}: is not contiguous (strides {list(stride)}); save a contiguous one")
        step *= extent
    return dtype, key, first, tuple(shape)


def check_sum(fd: int, offset: int, size: int, crc: int, path: Path, where: str) -> None:
    """Verify the CRC-32 of ``size`` bytes from ``offset``. Raises a ``DamagedError`` that names ``where``."""
    found, done = 0, 0
    buffer = tensor_bytes(scratch_buffer())
    while done < size:
        piece = buffer[: min(PIECE, size - done)]
        read_exactly(fd, piece, offset + done, path)
        found = zlib.crc32(piece, found)
        done += len(piece)
    if found != crc:
        raise DamagedError(f"{where}: damaged: its CRC-32 is not the one that was written with it; copy the file again")
