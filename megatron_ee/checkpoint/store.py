"""Reads a native checkpoint in any slicing, and verifies every block."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ee.checkpoint.digest import is_sha256
from megatron_ee.checkpoint.manifest import BLOCK, MANIFEST, VERSION, Box, encode, intersect, is_inside, tiling_problem
from megatron_ee.checkpoint.safetensors_file import DTYPES, TensorEntry, is_index_list, read_box, read_header
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.checkpoint.verified import VerifiedFile
from megatron_ee.config.untrusted import read_json
from megatron_ee.errors import CheckpointError, DamagedError, shown, storage_errors


@dataclass(frozen=True)
class _Stored:
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[tuple[Box, TensorEntry, VerifiedFile]]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: manifest and headers are checked, no tensor is read yet.

    Attributes:
        path: its directory.
        metadata: the argument of ``write_checkpoint``.
        verify: whether checksums are checked.
    """

    path: Path
    metadata: dict[str, Any]
    verify: bool
    _tensors: dict[str, _Stored] = field(repr=False)

    def keys(self) -> list[str]:
        """Global keys, sorted."""
        return sorted(self._tensors)

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor. Raises CheckpointError for an unknown key."""
        return self._stored(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Dtype that a tensor is stored in. Raises CheckpointError for an unknown key."""
        return self._stored(key).dtype

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by global key, sorted; none is read yet."""
        return {key: self._lazily(key) for key in self.keys()}

    def _lazily(self, key: str) -> StoredTensor:
        found = self._stored(key)
        # The manifest holds the digests, so any change of the tensor changes the manifest.
        files = (self.path / MANIFEST, *{shard.path: None for _, _, shard in found.pieces})

        def read(out: Tensor, offset: Sequence[int]) -> None:
            self.read(key, out, offset)

        return StoredTensor(found.dtype, found.shape, read, files)

    def read(self, key: str, out: Tensor, offset: Sequence[int] | None = None) -> Tensor:
        """Read a box of a tensor into ``out`` and return it.

        Each block of each file is verified as it is read, unless the checkpoint was opened without ``verify``. After an
        error the content of ``out`` is undefined.

        Args:
            key: global key of the tensor.
            out: of the box's shape, with any strides and device; floating dtypes are converted.
            offset: start of the box; None to read the whole tensor.

        Raises:
            CheckpointError: the tensor does not exist, the box is not inside it, or the dtypes do not convert.
            DamagedError: a file's content has changed.
        """
        stored = self._stored(key)
        box: Box = ((0,) * out.dim() if offset is None else tuple(offset), tuple(out.shape))
        if not is_inside(stored.shape, box) or (offset is None and box[1] != stored.shape):
            raise CheckpointError(
                f"{self.path}: tensor {key!r} has shape {list(stored.shape)}, "
                f"expected a box of shape {list(box[1])} at {list(box[0])}"
            )
        for piece, entry, shard in stored.pieces:
            common = intersect(box, piece)
            if common is None:
                continue
            low, extent = common
            target = out
            for dim, (first, start, count) in enumerate(zip(low, box[0], extent, strict=True)):
                target = target.narrow(dim, first - start, count)
            inside = [first - start for first, start in zip(low, piece[0], strict=True)]
            read_box(entry, target, inside, partial(shard.read, tensor=key) if self.verify else None)
        return out

    def _stored(self, key: str) -> _Stored:
        if key not in self._tensors:
            raise CheckpointError(f"{self.path}: there is no tensor {key!r} in it")
        return self._tensors[key]


def open_checkpoint(directory: str | os.PathLike[str], *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint directory and check its manifest and headers.

    Args:
        directory: the checkpoint.
        verify: verify the tensors' bytes when they are read.

    Raises:
        CheckpointError: it is not a checkpoint, has another version, or cannot be read.
        DamagedError: the manifest or a header is damaged, a shard is missing or has another size, or pieces do not fit.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    with storage_errors(directory, "read"):
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such checkpoint directory")
    if not os.path.lexists(path):
        raise DamagedError(f"{directory}: {MANIFEST} is missing; the checkpoint is not complete")
    if os.path.islink(path):
        raise DamagedError(f"{path}: is a link; a checkpoint's files lie in it")
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: expected a JSON object")
    expected = content.pop("sha256", None)
    if hashlib.sha256(encode(content, path)).hexdigest() != expected:
        raise DamagedError(f"{path}: damaged: its SHA-256 is not the one it states")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {shown(content.get('version'))} is not known here, only {VERSION}; upgrade"
        )
    files, tensors, metadata = (
        _object(content.get(name), f"{path}: {name}") for name in ("files", "tensors", "metadata")
    )
    shards = {name: _open_shard(directory, name, file) for name, file in files.items()}
    return Checkpoint(directory, metadata, verify, dict(_open_tensors(path, tensors, shards)))


def _object(value: Any, where: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Check that ``value`` is a JSON object with at least these keys, and return it."""
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        raise DamagedError(f"{where}: expected an object" + (f" with {', '.join(keys)}" if keys else ""))
    return value


def _open_shard(directory: Path, name: str, file: Any) -> tuple[VerifiedFile, dict[str, TensorEntry]]:
    path, where = directory / name, f"{directory / MANIFEST}: file {shown(name)}"
    file = _object(file, where, ("size", "blocks"))
    if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable() or os.path.islink(path):
        raise DamagedError(f"{where} is not a plain safetensors file beside it")
    with storage_errors(path, "read"):
        if not path.exists():
            raise DamagedError(f"{path}: missing; the checkpoint is not complete")
        if not path.is_file():
            raise DamagedError(f"{path}: is not a regular file")
        size = path.stat().st_size
    if size != file["size"]:
        raise DamagedError(f"{path}: truncated or changed: expected {shown(file['size'])} bytes, found {size}")
    blocks = file["blocks"]
    if not isinstance(blocks, list) or len(blocks) != -(-size // BLOCK) or not all(map(is_sha256, blocks)):
        raise DamagedError(f"{where}: its blocks are not one SHA-256 for each {BLOCK} of its {size} bytes")
    entries = read_header(path)
    return VerifiedFile(path, size, size - sum(entry.nbytes for entry in entries.values()), blocks), entries


def _open_tensors(
    path: Path, tensors: Mapping[str, Any], shards: Mapping[str, tuple[VerifiedFile, dict[str, TensorEntry]]]
) -> Iterator[tuple[str, _Stored]]:
    used: set[tuple[str, str]] = set()
    for key, tensor in tensors.items():
        where = f"{path}: tensor {shown(key)}"
        tensor = _object(tensor, where, ("dtype", "shape", "pieces"))
        dtype = DTYPES.get(tensor["dtype"]) if isinstance(tensor["dtype"], str) else None
        if dtype is None or not key.isprintable() or not isinstance(tensor["pieces"], list):
            raise DamagedError(f"{where}: its name, dtype or pieces are invalid")
        if not is_index_list(tensor["shape"]):
            raise DamagedError(f"{where}: shape {shown(tensor['shape'])} is not a list of whole numbers from 0")
        pieces: list[tuple[Box, TensorEntry, VerifiedFile]] = []
        for piece in tensor["pieces"]:
            piece = _object(piece, f"{where}: piece", ("file", "name", "offset", "shape"))
            if not is_index_list(piece["offset"]) or not is_index_list(piece["shape"]):
                raise DamagedError(f"{where}: offset and shape of a piece are not lists of whole numbers from 0")
            pieces.append(((piece["offset"], piece["shape"]), *_stored_piece(where, piece, dtype, shards, used)))
        problem = tiling_problem(tensor["shape"], [box for box, _, _ in pieces])
        if problem:
            raise DamagedError(f"{where}: {problem}")
        yield key, _Stored(dtype, tuple(tensor["shape"]), pieces)


def _stored_piece(
    where: str,
    piece: dict[str, Any],
    dtype: torch.dtype,
    shards: Mapping[str, tuple[VerifiedFile, dict[str, TensorEntry]]],
    used: set[tuple[str, str]],
) -> tuple[TensorEntry, VerifiedFile]:
    file, name = piece["file"], piece["name"]
    if not (isinstance(file, str) and isinstance(name, str) and file in shards):
        raise DamagedError(f"{where}: a piece is said to be in {shown(file)}, which is not one of its files")
    shard, entries = shards[file]
    entry = entries.get(name)
    if entry is None or entry.dtype != dtype or list(entry.shape) != piece["shape"]:
        raise DamagedError(f"{shard.path}: {shown(name)} is missing or not as {MANIFEST} says")
    if (file, name) in used:
        raise DamagedError(f"{where}: {shown(name)} of {file} is used twice")
    used.add((file, name))
    return entry, shard
