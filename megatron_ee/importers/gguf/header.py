"""The header of a GGUF file: its metadata, and the place of each tensor. Every size is checked before it is used.

``gguf.GGUFReader`` is not used: it trusts the counts in the file, so that a hostile file makes it fill the memory, and
it needs seconds for the tokens of a vocabulary.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from megatron_ee.config.untrusted import MAX_VALUES, open_regular
from megatron_ee.errors import CheckpointError, DamagedError, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 256 * 2**20  # bytes; ten times the largest vocabularies
MAX_DIMENSIONS = 4
_SCALARS: dict[int, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file.

    Attributes:
        path: the file.
        name: as GGUF has it.
        type: how its values are stored.
        shape: as in torch, the last dimension contiguous. GGUF's own order is the reverse.
        position: of its first byte in the file.
        nbytes: in the file.
    """

    path: Path
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    position: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Everything before the tensors' bytes.

    Attributes:
        path: the file; of a model in parts, the first one.
        metadata: values by key: numbers, flags, texts, and lists of one of them.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read and check the header.

    Raises:
        CheckpointError: not a GGUF file, or of another version, byte order or kind.
        DamagedError: truncated, or sizes that cannot be.
    """
    with open_regular(path) as fd:
        source = _Source(fd, path)
        tensor_count, value_count = _read_start(source)
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = source.text("a key")
            if key in metadata:
                raise DamagedError(f"{path}: key {shown(key)} appears twice")
            metadata[key] = source.value(source.number("<u4"), f"key {shown(key)}")
        entries = [_read_tensor_entry(source) for _ in range(tensor_count)]
        return Header(path, metadata, _place(source, entries, _alignment(path, metadata)))


class _Source:
    """Takes values from the file in order. None of them is larger than what is left of it."""

    def __init__(self, fd: int, path: Path) -> None:
        self.path, self.size, self.position = path, os.fstat(fd).st_size, 0
        self._file = open(fd, "rb", closefd=False)  # noqa: SIM115  the descriptor is the caller's

    def take(self, count: int, what: str) -> bytes:
        self.check(count, what)
        if self.position + count > MAX_HEADER:
            raise CheckpointError(f"{self.path}: its header is longer than {MAX_HEADER} bytes; no model has so much")
        data = self._file.read(count)
        if len(data) < count:
            raise DamagedError(f"{self.path}: truncated: the file became shorter while it was read")
        self.position += count
        return data

    def check(self, count: int, what: str) -> None:
        """Refuse ``count`` bytes that the file does not have."""
        if count > self.size - self.position:
            raise DamagedError(
                f"{self.path}: truncated or damaged: {what} needs {count} bytes at byte {self.position}, but the file "
                f"has {self.size} bytes; get the file again"
            )

    def number(self, dtype: str) -> int:
        kind = np.dtype(dtype)
        return int(np.frombuffer(self.take(kind.itemsize, "a number"), kind)[0])

    def text(self, what: str) -> str:
        try:
            return self.take(self.number("<u8"), what).decode("utf-8")
        except UnicodeDecodeError:
            raise DamagedError(f"{self.path}: {what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            dtype = _SCALARS[kind]
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind == GGUFValueType.STRING:
            return self.text(what)
        if kind == GGUFValueType.ARRAY:
            return self._values(what)
        raise DamagedError(f"{self.path}: {what} has the unknown type {kind}")

    def _values(self, what: str) -> list[Any]:
        kind, count = self.number("<u4"), self.number("<u8")
        if count > MAX_VALUES:
            raise DamagedError(f"{self.path}: {what} claims {count} values; at most {MAX_VALUES} are read")
        if kind in _SCALARS:
            dtype = _SCALARS[kind]
            values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize, what), dtype).tolist()
            return values
        if kind == GGUFValueType.STRING:
            self.check(8 * count, what)
            return [self.text(what) for _ in range(count)]
        raise DamagedError(f"{self.path}: {what} is a list of the type {kind}, which is not read")


def _read_start(source: _Source) -> tuple[int, int]:
    """The number of tensors and of values."""
    if source.size < len(MAGIC) or source.take(len(MAGIC), "the file's type") != MAGIC:
        raise CheckpointError(f"{source.path}: is not a GGUF file: it does not begin with {MAGIC.decode()}")
    version = source.number("<u4")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(f"{source.path}: is a big-endian GGUF file; only little-endian ones are read")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{source.path}: is GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} are read"
        )
    tensors, values = source.number("<u8"), source.number("<u8")
    source.check(tensors * 24, f"a header of {tensors} tensors")  # less than any of them takes
    source.check(values * 13, f"a header of {values} values")
    return tensors, values


def _read_tensor_entry(source: _Source) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor, as the file states them."""
    name = source.text("a tensor's name")
    dimensions = source.number("<u4")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise DamagedError(f"{source.path}: tensor {shown(name)} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS}")
    shape = tuple(source.number("<u8") for _ in range(dimensions))[::-1]
    return name, shape, source.number("<u4"), source.number("<u8")


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(value) is not int or not 8 <= value <= 2**20 or value & (value - 1):
        raise DamagedError(f"{path}: general.alignment must be a power of two, not {shown(value)}")
    return value


def _place(
    source: _Source, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int
) -> dict[str, TensorInfo]:
    """The tensors, all of which must lie within the file."""
    start = -(-source.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        where = f"{source.path}: tensor {shown(name)}"
        if name in tensors:
            raise DamagedError(f"{where} appears twice")
        try:
            stored = GGMLQuantizationType(kind)
        except ValueError:
            raise CheckpointError(
                f"{where} has the type {kind}, which the installed package gguf does not know"
            ) from None
        block, size = GGML_QUANT_SIZES[stored]
        if 0 in shape or shape[-1] % block:
            raise DamagedError(f"{where}: shape {list(shape)} is impossible for {stored.name}, of blocks of {block}")
        nbytes = math.prod(shape) // block * size
        if offset % alignment or start + offset + nbytes > source.size:
            raise DamagedError(
                f"{where}: truncated or damaged: shape {list(shape)} of {stored.name} needs {nbytes} bytes at byte "
                f"{start + offset}, but the file has {source.size} bytes; get the file again"
            )
        tensors[name] = TensorInfo(source.path, name, stored, shape, start + offset, nbytes)
    return tensors
