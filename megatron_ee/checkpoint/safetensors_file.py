"""One safetensors file: strict header checks, reads without intermediate copies, streaming writes.

Format: 8 bytes little-endian length n, n bytes of JSON ``{name: {dtype, shape, data_offsets}}``, then the tensors'
bytes, row-major, without gaps (https://huggingface.co/docs/safetensors). The ``safetensors`` library maps files into
memory, so the pages that it reads count towards peak memory. This module uses ``preadv``, which copies bytes from the
page cache into the tensor's memory, with a small buffer only if dtype, strides or device differ.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ee.checkpoint.atomic import new_file, write_all
from megatron_ee.config.untrusted import open_regular, parse_json, read_exactly
from megatron_ee.errors import CheckpointError, DamagedError, shown

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 32 * 2**20  # bytes; the largest models' are below 1 MiB
PIECE = 4 * 2**20  # bytes of the buffer for conversions and hashes: small enough to stay in cache
SMALL_GAP = 32 * 2**10  # bytes: reading a gap of at most this size costs less than another system call
_DIRECT = 64 * 2**10  # bytes: contiguous runs of at least this size are read directly into their destination
_scratch = threading.local()
ReadBytes = Callable[[int, memoryview, int], None]
"""Fills memory with the bytes of an open file from a position. Arguments: descriptor, memory, position."""
Fetch = Callable[[memoryview, int], None]
"""The same for one file. Arguments: memory, position."""


@dataclass(frozen=True)
class TensorEntry:
    """Location of one tensor's bytes.

    Attributes:
        name: name in the file.
        dtype: dtype in the file.
        shape: shape in the file.
        path: the file.
        offset: position of the first byte in the file.
        nbytes: number of bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


# ------------------------------------------------------------------------------------------------------ header


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Read the header of one file and check it against the file's size. No tensor bytes are read.

    Raises:
        CheckpointError: the file cannot be opened.
        DamagedError: it is not a safetensors file, is truncated, or its header is inconsistent.
    """
    path = Path(path)
    header, start, size = _load_header(path)
    entries = {}
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        if not name.isprintable():
            raise DamagedError(f"{path}: tensor name {shown(name)} has unprintable characters")
        entries[name] = _parse_entry(path, name, fields, start)
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=start)
    if end > size:
        raise DamagedError(f"{path}: truncated: expected {end} bytes, found {size}; copy or download it again")
    position = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            what = "overlaps another tensor" if entry.offset < position else "leaves unused bytes before it"
            raise DamagedError(f"{path}: tensor {entry.name!r} {what} (data_offsets)")
        position += entry.nbytes
    if end < size:
        raise DamagedError(f"{path}: expected {end} bytes, found {size}: more than the header describes")
    return entries


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read ``__metadata__`` of one file.

    Raises:
        CheckpointError: as ``read_header``.
    """
    metadata: dict[str, str] = _load_header(Path(path))[0].get("__metadata__", {})
    return metadata


def _load_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the position where tensor bytes start, and the file's size."""
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        first = os.pread(fd, 8, 0)
        if first == b"version ":
            raise DamagedError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull`")
        if len(first) < 8:
            raise DamagedError(f"{path}: truncated: expected at least 8 bytes, found {size}")
        length = int.from_bytes(first, "little")
        if length > MAX_HEADER:
            raise DamagedError(f"{path}: not a safetensors file: a header of {length} bytes is too large")
        if 8 + length > size:
            raise DamagedError(
                f"{path}: truncated: expected at least {8 + length} bytes, found {size}; copy or download it again"
            )
        data = bytearray(length)
        read_exactly(fd, memoryview(data), 8, path)
    header = parse_json(bytes(data), f"{path}: header")
    if not isinstance(header, dict):
        raise DamagedError(f"{path}: header: expected a JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedError(f"{path}: header: __metadata__ must map strings to strings")
    return header, 8 + length, size


def _parse_entry(path: Path, name: str, fields: Any, start: int) -> TensorEntry:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise DamagedError(f"{where}: expected dtype, shape and data_offsets in the header")
    spelled, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    dtype = DTYPES.get(spelled) if isinstance(spelled, str) else None
    if dtype is None:
        raise DamagedError(f"{where}: dtype {shown(spelled)} is not known; known: {', '.join(DTYPES)}")
    if not is_index_list(shape) or len(shape) > 64:
        raise DamagedError(f"{where}: shape {shown(shape)} is not a list of whole numbers from 0")
    if not is_index_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise DamagedError(f"{where}: data_offsets {shown(offsets)} are not [begin, end]")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise DamagedError(f"{where}: shape {shape} of {spelled} does not fit the {nbytes} bytes it is given")
    if math.prod(max(1, extent) for extent in shape) * dtype.itemsize >= 2**63:
        raise DamagedError(f"{where}: shape {shape} has no element, but impossibly large sizes")
    return TensorEntry(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def is_index_list(value: Any) -> bool:
    """Whether ``value`` is a list of integers from 0 that fit 63 bits (JSON's true and 1.0 are not integers)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


# -------------------------------------------------------------------------------------------------------- read


def read_into(entry: TensorEntry, out: Tensor) -> None:
    """Read the whole tensor into ``out`` of the same shape, with any strides, device and floating dtype.

    Raises:
        CheckpointError: the shape differs, the dtypes do not convert, or the file cannot be read.
    """
    if tuple(out.shape) != entry.shape:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name!r} has shape {list(entry.shape)}, expected {list(out.shape)}"
        )
    read_box(entry, out, (0,) * out.dim())


def read_box(entry: TensorEntry, out: Tensor, offset: Sequence[int], read: ReadBytes | None = None) -> None:
    """Read a box of a tensor into ``out``. It needs one buffer of ``PIECE`` bytes per thread.

    Args:
        entry: the tensor.
        out: of the box's shape, with any strides and device; floating dtypes are converted, others must be equal.
        offset: start of the box, one index per dimension.
        read: reads from the open file; None for a plain read.

    Raises:
        CheckpointError: the box is not inside the tensor, the dtypes do not convert, or the file cannot be read.
    """
    out = out.detach()
    _check_box(entry, out, offset)
    if out.numel() == 0:
        return
    # The box's bytes are contiguous in the file from the last dimension that it does not span.
    cut = max((dim for dim in range(out.dim()) if out.shape[dim] != entry.shape[dim]), default=0)
    pitches = [math.prod(entry.shape[dim + 1 :]) * entry.dtype.itemsize for dim in range(out.dim())]
    origin = entry.offset + sum(first * pitch for first, pitch in zip(offset, pitches, strict=True))
    with open_regular(entry.path) as fd:

        def fetch(memory: memoryview, position: int) -> None:
            if read is None:
                read_exactly(fd, memory, position, entry.path)
            else:
                read(fd, memory, position)

        if cut == 0:
            _read_run(fetch, entry, origin, out)
            return
        for index in itertools.product(*(range(extent) for extent in out.shape[: cut - 1])):
            position = origin + sum(step * pitch for step, pitch in zip(index, pitches, strict=False))
            _read_strided(fetch, entry, position, pitches[cut - 1], out[index])


def _check_box(entry: TensorEntry, out: Tensor, offset: Sequence[int]) -> None:
    where = f"{entry.path}: tensor {entry.name!r}"
    inside = len(offset) == out.dim() == len(entry.shape) and all(
        first >= 0 and first + extent <= whole
        for first, extent, whole in zip(offset, out.shape, entry.shape, strict=True)
    )
    if not inside:
        raise CheckpointError(
            f"{where}: a box of shape {list(out.shape)} at {list(offset)} is not inside shape {list(entry.shape)}"
        )
    if out.dtype != entry.dtype and not (out.dtype.is_floating_point and entry.dtype.is_floating_point):
        raise CheckpointError(f"{where} is {DTYPE_NAMES[entry.dtype]} and cannot be read as {out.dtype}")


def _in_place(entry: TensorEntry, out: Tensor) -> bool:
    return out.dtype == entry.dtype and out.device.type == "cpu"


def _read_run(fetch: Fetch, entry: TensorEntry, position: int, out: Tensor) -> None:
    """Read one contiguous run of the file into ``out``: directly if its memory layout permits, else in pieces."""
    in_place = _in_place(entry, out)
    if in_place and out.is_contiguous():
        fetch(tensor_bytes(out), position)
        return
    nbytes = out.numel() * entry.dtype.itemsize
    straight = False
    if out.dim() > 0:
        inner = nbytes // out.shape[0]
        straight = in_place and inner >= _DIRECT and out[0].is_contiguous()
    if nbytes <= PIECE and not straight:
        buffer = scratch_buffer()[:nbytes]
        fetch(tensor_bytes(buffer), position)
        out.copy_(buffer.view(entry.dtype).view(out.shape))
        return
    rows = 1 if straight else max(1, PIECE // inner)
    for first in range(0, out.shape[0], rows):
        part = out[first : first + rows] if rows > 1 else out[first]
        _read_run(fetch, entry, position + first * inner, part)


def _read_strided(fetch: Fetch, entry: TensorEntry, position: int, pitch: int, out: Tensor) -> None:
    """Read ``out[i]`` from ``position + i * pitch`` for each i: one row, or many rows with small gaps, at a time."""
    count = out.shape[0]
    run = out.numel() // count * entry.dtype.itemsize
    rows = min(count, (PIECE - run) // pitch + 1) if run <= PIECE else 1
    if rows == 1 or pitch - run > SMALL_GAP:
        for row in range(count):
            _read_run(fetch, entry, position + row * pitch, out[row])
        return
    item = entry.dtype.itemsize
    for first in range(0, count, rows):
        part = out[first : first + rows]
        buffer = scratch_buffer()[: (part.shape[0] - 1) * pitch + run]
        fetch(tensor_bytes(buffer), position + first * pitch)
        wanted = buffer.view(entry.dtype).as_strided((part.shape[0], run // item), (pitch // item, 1))
        part.copy_(wanted.reshape(part.shape))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as a flat view of bytes."""
    # as_strided, since view() refuses some strides of dimensions of size 1 in a contiguous tensor.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def scratch_buffer() -> Tensor:
    """This thread's buffer, uint8 [PIECE]. Its content is valid until the next use in the same thread."""
    if not hasattr(_scratch, "buffer"):
        _scratch.buffer = torch.empty(PIECE, dtype=torch.uint8)
    buffer: Tensor = _scratch.buffer
    return buffer


# ------------------------------------------------------------------------------------------------------- write


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    on_bytes: Callable[[memoryview], None] | None = None,
    content: Callable[[str], Iterable[Tensor]] | None = None,
) -> dict[str, TensorEntry]:
    """Write one file, tensor by tensor, under a temporary name; then fsync it and rename it to ``path``.

    Contiguous CPU tensors are written directly, others through one small buffer. Wider dtypes come first, so that every
    tensor is aligned for readers that map the file.

    Args:
        path: the file.
        tensors: by name.
        metadata: strings to store.
        on_bytes: called with all bytes in the file's order, for example to hash them.
        content: for ``tensors`` that have only shapes and dtypes: returns a tensor's elements by name, row-major, as
            consecutive runs. It is called in the file's order.

    Returns:
        The result of ``read_header(path)``.

    Raises:
        CheckpointError: the format does not support a dtype or name, or the file cannot be written.
    """
    path = Path(path)
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    pairs.sort(key=lambda pair: -pair[1].dtype.itemsize)
    header, entries = _plan_file(path, pairs, metadata)
    with new_file(path) as fd:
        runs = (run for name, tensor in pairs for run in (content(name) if content else (tensor,)))
        bodies = (_file_bytes(run.detach()) for run in runs)
        for data in itertools.chain((memoryview(header),), itertools.chain.from_iterable(bodies)):
            write_all(fd, data)
            if on_bytes is not None:
                on_bytes(data)
        _check_length(path, fd, entries, len(header))
    return entries


def _check_length(path: Path, fd: int, entries: Mapping[str, TensorEntry], header: int) -> None:
    expected = header + sum(entry.nbytes for entry in entries.values())
    written = os.lseek(fd, 0, os.SEEK_CUR)
    if written != expected:
        raise CheckpointError(f"{path}: {written} bytes were given for the {expected} of its tensors")


def _file_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in the file's order. Each run is overwritten by the next."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        yield tensor_bytes(tensor)
        return
    nbytes = tensor.numel() * tensor.dtype.itemsize
    if nbytes <= PIECE:
        buffer = scratch_buffer()[:nbytes]
        buffer.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        yield tensor_bytes(buffer)
        return
    rows = max(1, PIECE * tensor.shape[0] // nbytes)
    for first in range(0, tensor.shape[0], rows):
        yield from _file_bytes(tensor[first : first + rows] if rows > 1 else tensor[first])


def _plan_file(
    path: Path, pairs: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The bytes before the first tensor, and the location of each tensor."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in pairs:
        if name in header or name == "__metadata__" or not name.isprintable():
            raise CheckpointError(f"{path}: tensor name {name!r} appears twice or cannot be used")
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{path}: tensor {name!r}: {tensor.dtype} cannot be stored in a safetensors file")
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        fields = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name] = fields
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % 64)  # tensors start on a cache line, which makes copying them faster
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"{path}: a header of {len(text)} bytes is too large; write fewer tensors into one file")
    start = 8 + len(text)
    entries = {name: _parse_entry(path, name, header[name], start) for name, _ in pairs}
    return len(text).to_bytes(8, "little") + text, entries
