"""The ``.metadata`` of a torch distributed checkpoint: its tensors, and the file of each box.

It is a pickle; only plain values in it are used. Tensors are checked and opened on demand, because a checkpoint of a
training run holds many that are not needed.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ee.checkpoint.safetensors_file import DTYPE_NAMES, TensorEntry, read_box
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.untrusted import allowed_root, check_confined, open_regular, read_exactly
from megatron_ee.errors import CheckpointError, DamagedError, shown
from megatron_ee.importers.megatron.archive import Archive, damage, locate_tensor
from megatron_ee.importers.megatron.guarded import MAX_PICKLE, Inert, unpickle

METADATA = ".metadata"
_DTYPES = {str(dtype): dtype for dtype in DTYPE_NAMES}
KNOWN = (
    "torch.distributed.checkpoint",
    # Earlier modules of some of these classes.
    "torch.distributed._shard.metadata",
    "torch.distributed._shard.sharded_tensor.metadata",
    "torch.serialization._get_layout",
    "torch.Size",
    *_DTYPES,
    "collections",
    "builtins.set",
    "megatron.core.dist_checkpointing",
    "pathlib",
)
"""Names that the pickle may contain, in addition to plain values; see ``unpickle``."""
ENUMS: dict[str, Collection[str]] = {
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": (
        "TORCH_CONTIGUOUS_FORMAT",
        "TORCH_CHANNELS_LAST",
        "TORCH_PRESERVE_FORMAT",
    ),
    "torch.distributed.checkpoint.planner.WriteItemType": ("TENSOR", "SHARD", "BYTE_IO"),
}
"""Enums that the pickle may contain, with their members; the second is in the plans that Megatron stores."""

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape
Place = tuple[str, int, int]  # file name, first byte and number of bytes


@dataclass(frozen=True)
class Item:
    """One box of a tensor: ``length`` bytes of ``path`` from ``start``, written by ``torch.save``."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class Metadata:
    """The content of ``.metadata``.

    Attributes:
        path: the directory.
        tensors: descriptions by key; None for objects that are not tensors.
        places: locations by key and offset of the box.
    """

    path: Path
    tensors: Mapping[str, Any]
    places: Mapping[tuple[str, tuple[int, ...]], Place]


def read_metadata(directory: Path) -> Metadata:
    """Read ``directory/.metadata``.

    Raises:
        CheckpointError: it is missing, or contains a name that is not allowed.
        DamagedError: it is not in torch's format.
    """
    path = directory / METADATA
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; the checkpoint is not complete")
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        if size > MAX_PICKLE:
            raise CheckpointError(f"{path}: {size} bytes are too many for this file; at most {MAX_PICKLE} are read")
        data = bytearray(size)
        read_exactly(fd, memoryview(data), 0, path)
    top = _fields(unpickle(bytes(data), str(path), known=KNOWN, enums=ENUMS), path)
    described, stored = top.get("state_dict_metadata"), top.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise DamagedError(f"{path}: not the metadata of a torch distributed checkpoint")
    tensors = {}
    for key, value in described.items():
        if type(key) is not str or not isinstance(value, Inert):
            raise DamagedError(f"{path}: {shown(key)} is not described as torch does it")
        tensors[key] = value if value.origin[1] == "TensorStorageMetadata" else None
    return Metadata(directory, tensors, dict(_places(stored, path)))


def _places(stored: dict[Any, Any], path: Path) -> Iterator[tuple[tuple[str, tuple[int, ...]], Place]]:
    for index, info in stored.items():
        key, place = _fields(index, path), _fields(info, path)
        name, start, length = (place.get(field) for field in ("relative_path", "offset", "length"))
        offset = () if key.get("offset") is None else _sizes(key["offset"])
        if type(key.get("fqn")) is not str or offset is None or type(name) is not str:
            raise DamagedError(f"{path}: storage_data does not say where {shown(key.get('fqn'))} is")
        if _sizes((start, length)) is None:
            raise DamagedError(f"{path}: {shown(key['fqn'])} is at {shown((start, length))}, which is not valid")
        if place.get("transform_descriptors"):
            raise CheckpointError(f"{path}: {shown(key['fqn'])} is compressed or encoded; save it without")
        yield (key["fqn"], offset), (name, start, length)  # type: ignore[misc]


def _fields(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, Inert) or not isinstance(value.state, dict):
        raise DamagedError(f"{path}: not the metadata of a torch distributed checkpoint")
    return value.state


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A ``torch.Size`` or plain tuple of numbers from 0; None for anything else."""
    if isinstance(value, Inert) and value.origin == ("torch", "Size") and len(value.args) == 1:
        value = value.args[0]
    fine = isinstance(value, tuple) and all(type(each) is int and 0 <= each < 2**63 for each in value)
    return value if fine else None


def open_tensor(metadata: Metadata, key: str, *, verify: bool) -> StoredTensor:
    """Open one tensor. Its bytes are read on demand.

    Args:
        metadata: of the checkpoint.
        key: key of the tensor.
        verify: verify the CRC-32 of each item at the first read from it.

    Raises:
        CheckpointError: a file is missing or outside the directory.
        DamagedError: the description is inconsistent, or a file is truncated.
    """
    path = metadata.path / METADATA
    where = f"{path}: tensor {shown(key)}"
    fields = _fields(metadata.tensors[key], path)
    shape, dtype, chunks = _sizes(fields.get("size")), tensor_dtype(metadata, key), fields.get("chunks")
    if shape is None or dtype is None or not isinstance(chunks, list):
        raise DamagedError(f"{where}: dtype, size and chunks are not as torch writes them")
    boxes: list[Box] = []
    for chunk in chunks:
        offset, extent = (_sizes(_fields(chunk, path).get(name)) for name in ("offsets", "sizes"))
        if offset is None or extent is None or not len(offset) == len(extent) == len(shape):
            raise DamagedError(f"{where}: a chunk is not a box of {len(shape)} dimensions")
        boxes.append((offset, extent))
    if not 1 <= len(shape) <= 8 or not _fill(boxes, shape):
        raise DamagedError(f"{where}: its {len(boxes)} chunks do not fill its shape {list(shape[:8])}")
    items = _items(metadata, key, boxes)
    files = (path, *dict.fromkeys(item.path for item in items))
    return StoredTensor(dtype, shape, _reader(key, dtype, items, verify), files, key)


def read_object(metadata: Metadata, key: str) -> Any:
    """Read an object that is not a tensor, with ``unpickle``. Tensors in it are left out.

    Raises:
        CheckpointError: its file is missing or outside the directory, or it contains a name that is not allowed.
        DamagedError: no file is recorded for it, or the file is truncated or malformed.
    """
    (item,) = _items(metadata, key, [((), ())])
    where = f"{item.path}: {shown(key)}"
    with open_regular(item.path) as fd, damage(where):
        archive = Archive(fd, item.start, item.length)
        return unpickle(archive.content("data.pkl"), where, load_storage=lambda pid: None)


def tensor_dtype(metadata: Metadata, key: str) -> torch.dtype | None:
    """Dtype of a tensor; None if its description does not have torch's form."""
    properties = _fields(metadata.tensors[key], metadata.path / METADATA).get("properties")
    state = properties.state if isinstance(properties, Inert) else None
    spelled = getattr(state[0], "origin", None) if isinstance(state, tuple) and state else None
    return _DTYPES.get(".".join(spelled)) if isinstance(spelled, tuple) else None


def _fill(boxes: Sequence[Box], shape: Sequence[int], dim: int = 0) -> bool:
    """Whether the boxes tile ``shape`` exactly, from dimension ``dim`` on.

    All programs that write such checkpoints split one dimension after the other, so only such splits are recognised.
    """
    if dim == len(shape):
        return len(boxes) == 1
    slices: dict[tuple[int, int], list[Box]] = {}
    for offset, extent in boxes:
        slices.setdefault((offset[dim], extent[dim]), []).append((offset, extent))
    end = 0
    for start, length in sorted(slices):
        if start != end:
            return False
        end += length
    return end == shape[dim] and all(_fill(part, shape, dim + 1) for part in slices.values())


def _items(metadata: Metadata, key: str, boxes: Sequence[Box]) -> tuple[Item, ...]:
    """Locate each box, and check that its file exists and is long enough."""
    path, ends = metadata.path / METADATA, dict[str, int]()
    items = []
    for offset, extent in boxes:
        place = metadata.places.get((key, offset))
        if place is None:
            raise DamagedError(f"{path}: tensor {shown(key)}: no file is named for the chunk at {list(offset)}")
        name, start, length = place
        items.append(Item(offset, extent, metadata.path / name, start, length))
        ends[name] = max(ends.get(name, 0), start + length)
    for name, end in ends.items():
        file = metadata.path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing, which {METADATA} names for tensor {shown(key)}")
        check_confined(file, allowed_root(metadata.path), path)
        size = file.stat().st_size
        if end > size:
            raise DamagedError(f"{file}: truncated: expected {end} bytes, found {size}; copy it again")
    return tuple(items)


def _reader(
    key: str, dtype: torch.dtype, items: tuple[Item, ...], verify: bool
) -> Callable[[Tensor, Sequence[int]], None]:
    located: dict[Item, TensorEntry] = {}  # two threads may locate the same item at the same time, with the same result

    def entry(item: Item) -> TensorEntry:
        if item not in located:
            found = locate_tensor(item.path, item.start, item.length, key, verify=verify)
            if (found.dtype, found.shape) != (dtype, item.shape):
                raise DamagedError(
                    f"{item.path}: tensor {shown(key)}: found {found.dtype} {list(found.shape)} at byte {item.start}, "
                    f"where {METADATA} says {dtype} {list(item.shape)}"
                )
            located[item] = found
        return located[item]

    slices: dict[int, list[Item]] = {}  # by start along the first dimension
    for item in items:
        slices.setdefault(item.offset[0], []).append(item)
    starts = sorted(slices)

    def read(out: Tensor, offset: Sequence[int]) -> None:
        filled = 0
        touched = range(bisect.bisect_right(starts, offset[0]) - 1, bisect.bisect_left(starts, offset[0] + len(out)))
        for item in itertools.chain.from_iterable(slices[starts[number]] for number in touched):
            overlap = _overlap(item, out.shape, offset)
            if overlap is None:
                continue
            first, shape = overlap
            part = out[tuple(slice(f - o, f - o + s) for f, o, s in zip(first, offset, shape, strict=True))]
            read_box(entry(item), part, [f - o for f, o in zip(first, item.offset, strict=True)])
            filled += part.numel()
        assert filled == out.numel(), "a box must be inside the tensor"

    return read


def _overlap(item: Item, shape: Sequence[int], offset: Sequence[int]) -> Box | None:
    """The intersection of an item with the box of ``shape`` at ``offset``, as a box of the tensor; None if it is
    empty."""
    first = tuple(max(a, b) for a, b in zip(item.offset, offset, strict=True))
    stops = (min(a + m, b + n) for a, m, b, n in zip(item.offset, item.shape, offset, shape, strict=True))
    extent = tuple(stop - start for start, stop in zip(first, stops, strict=True))
    return (first, extent) if min(extent, default=1) > 0 else None
