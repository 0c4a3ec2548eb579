"""The native checkpoint: a directory of safetensors shards, one per rank, and ``manifest.json``, written last.

A tensor has a global key, dtype and shape; what is stored are boxes of it (pieces), which tile it exactly, so that it
can be read in any other slicing. The manifest has the SHA-256 of every 16 MiB block of every shard, the header
included, and of itself; blocks are verified as they are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_ee.checkpoint.atomic import (
    begin_directory,
    commit_directory,
    mark_damaged,
    numbered_directories,
    storage_errors,
    write_file,
)
from megatron_ee.checkpoint.digest import hash_range, hash_workers
from megatron_ee.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    DTYPES,
    DamagedError,
    TensorEntry,
    is_index_list,
    open_regular,
    read_box,
    read_header,
    read_json,
    write_safetensors,
)
from megatron_ee.errors import CheckpointError

MANIFEST = "manifest.json"
VERSION = 1
BLOCK = 16 * 2**20  # bytes per checksum

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]
Box = tuple[Sequence[int], Sequence[int]]  # offset, shape


@dataclass(frozen=True)
class Piece:
    """One box of a tensor, to be saved.

    Attributes:
        key: global key of the tensor.
        global_shape: shape of the whole tensor, without padding.
        offset: where the box starts, one index per dimension.
        tensor: the box's content; any strides and device.
    """

    key: str
    global_shape: Sequence[int]
    offset: Sequence[int]
    tensor: Tensor


def whole(key: str, tensor: Tensor) -> Piece:
    """The piece that is all of ``tensor``."""
    return Piece(key, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


# ------------------------------------------------------------------------------------------------------- write


def write_checkpoint(
    final: str | os.PathLike[str],
    pieces: Iterable[Piece],
    metadata: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> None:
    """Write a checkpoint directory: all of it, or nothing. Every rank calls this, with pieces of its own.

    Each rank writes ``shard-RRRR.safetensors`` (none without pieces); rank 0 writes the manifest and renames the
    directory to ``final``. Where one rank fails, all raise.

    Args:
        pieces: this rank's; over all ranks they must tile every tensor exactly, so a tensor that is equal on
            several ranks is given by one of them.
        metadata: JSON content to carry along; rank 0's counts. NaN and infinity are not JSON.
        gather: gives every rank the list of all ranks' objects (tuples, lists, dicts, strings and numbers), such as
            ``all_gather_object`` over a gloo group. Needed where ``world_size`` is above 1.

    Raises:
        CheckpointError: ``final`` exists, the pieces do not fit together, or the storage fails.
    """
    if world_size > 1 and gather is None:
        raise ValueError("write_checkpoint needs gather where there are several ranks")
    final = Path(final)
    begun: list[str] = []

    def begin() -> str:
        _encode(metadata, final)  # fail before anything is written
        if rank == 0:
            begun.append(str(begin_directory(final)))
        return begun[0] if begun else ""

    try:
        temporary = Path(_together(gather, begin)[0])
        shards = _together(gather, lambda: _write_shard(temporary, pieces, rank))
        if len(shards) != world_size:
            raise ValueError(f"gather returned {len(shards)} answers from {world_size} ranks")

        def finish() -> None:
            if rank == 0:
                write_file(temporary / MANIFEST, _manifest_bytes(final, shards, metadata))
                commit_directory(temporary, final)

        _together(gather, finish)
    except BaseException:
        for leftover in begun:
            shutil.rmtree(leftover, ignore_errors=True)
        raise


def _together(gather: Gather | None, work: Callable[[], T]) -> list[T]:
    """Every rank's result of ``work``, in order of rank; raises on all ranks where it raised on one."""
    if gather is None:
        return [work()]
    failure: Exception | None = None
    try:
        answer: tuple[Any, str | None] = (work(), None)
    except Exception as error:
        answer, failure = (None, str(error) or type(error).__name__), error
    answers = gather(answer)
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(answers):
        if message is not None:
            raise CheckpointError(f"rank {rank}: {message}")
    return [value for value, _ in answers]


class _BlockHasher:
    """SHA-256 of each ``BLOCK`` of a stream of bytes."""

    def __init__(self) -> None:
        self.size = 0
        self.blocks: list[str] = []
        self._current = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        while len(data) > 0:
            part = data[: BLOCK - self.size % BLOCK]
            self._current.update(part)
            self.size += len(part)
            data = data[len(part) :]
            if self.size % BLOCK == 0:
                self._end_block()

    def finish(self) -> list[str]:
        if self.size % BLOCK:
            self._end_block()
        return self.blocks

    def _end_block(self) -> None:
        self.blocks.append(self._current.hexdigest())
        self._current = hashlib.sha256()


def _write_shard(directory: Path, pieces: Iterable[Piece], rank: int) -> dict[str, Any] | None:
    """Write this rank's shard; returns what the manifest must say of it."""
    file = f"shard-{rank:04d}.safetensors"
    tensors: dict[str, Tensor] = {}
    described = []
    for piece in pieces:
        extent, offset = list(piece.tensor.shape), list(piece.offset)
        name = piece.key
        if extent != list(piece.global_shape):
            ranges = (f"{first}:{first + count}" for first, count in zip(offset, extent, strict=True))
            name = f"{piece.key}[{','.join(ranges)}]"
        if name in tensors:
            raise CheckpointError(f"{directory / file}: {name!r} is given twice")
        tensors[name] = piece.tensor
        dtype = DTYPE_NAMES.get(piece.tensor.dtype, str(piece.tensor.dtype))
        described.append([piece.key, dtype, list(piece.global_shape), name, offset, extent])
    if not tensors:
        return None
    hasher = _BlockHasher()
    write_safetensors(directory / file, tensors, on_bytes=hasher.update)
    blocks = hasher.finish()
    return {"file": file, "size": hasher.size, "blocks": blocks, "pieces": described}


def _manifest_bytes(final: Path, shards: Iterable[dict[str, Any] | None], metadata: Mapping[str, Any]) -> bytes:
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for shard in shards:
        if shard is None:
            continue
        files[shard["file"]] = {"size": shard["size"], "blocks": shard["blocks"]}
        for key, dtype, shape, name, offset, extent in shard["pieces"]:
            tensor = tensors.setdefault(key, {"dtype": dtype, "shape": shape, "pieces": []})
            if (tensor["dtype"], tensor["shape"]) != (dtype, shape):
                raise CheckpointError(f"{final}: tensor {key!r} has different dtypes or shapes on different ranks")
            tensor["pieces"].append({"file": shard["file"], "name": name, "offset": offset, "shape": extent})
    for key, tensor in tensors.items():
        problem = tiling_problem(tensor["shape"], [(piece["offset"], piece["shape"]) for piece in tensor["pieces"]])
        if problem:
            raise CheckpointError(f"{final}: tensor {key!r}: {problem}")
    content = {"version": VERSION, "metadata": metadata, "files": files, "tensors": tensors}
    content = json.loads(_encode(content, final))
    content["sha256"] = hashlib.sha256(_encode(content, final)).hexdigest()
    return json.dumps(content, indent=1).encode("utf-8")


def _encode(content: Any, where: Path) -> bytes:
    """JSON in one fixed spelling, which the manifest's own checksum is taken of."""
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: metadata is not JSON: {error}") from None


def tiling_problem(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why ``boxes`` do not cover ``shape`` exactly once, or None where they do."""
    covered = 0
    for offset, extent in boxes:
        if not _inside(shape, (offset, extent)):
            return f"the piece of shape {list(extent)} at {list(offset)} is not inside shape {list(shape)}"
        covered += math.prod(extent)
    solid = [box for box in boxes if math.prod(box[1])]
    if len(shape) > 0:
        solid.sort(key=lambda box: box[0][0])
        for index, first in enumerate(solid):
            for second in solid[index + 1 :]:
                if second[0][0] >= first[0][0] + first[1][0]:
                    break
                if intersect(first, second) is not None:
                    return f"the pieces at {list(first[0])} and {list(second[0])} overlap"
    if covered != math.prod(shape) or not boxes:
        return f"its pieces hold {covered} of {math.prod(shape)} elements"
    return None


def _inside(shape: Sequence[int], box: Box) -> bool:
    offset, extent = box
    return len(offset) == len(extent) == len(shape) and all(
        first >= 0 and count >= 0 and first + count <= size
        for first, count, size in zip(offset, extent, shape, strict=True)
    )


def intersect(first: Box, second: Box) -> Box | None:
    """The box common to both, or None where they share no element."""
    low = [max(a, b) for a, b in zip(first[0], second[0], strict=True)]
    ends = zip(first[0], first[1], second[0], second[1], strict=True)
    extent = [min(a + m, b + n) - start for start, (a, m, b, n) in zip(low, ends, strict=True)]
    return None if any(count <= 0 for count in extent) else (low, extent)


# -------------------------------------------------------------------------------------------------------- read


@dataclass
class _Shard:
    path: Path
    blocks: list[str]
    size: int
    header_end: int
    verified: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Stored:
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[tuple[Box, TensorEntry, _Shard]]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: manifest and headers are checked, no tensor is read yet.

    Attributes:
        path: its directory.
        metadata: what was given to ``write_checkpoint``.
    """

    path: Path
    metadata: dict[str, Any]
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

    def read(self, key: str, out: Tensor, offset: Sequence[int] | None = None, verify: bool = True) -> Tensor:
        """Read a box of a tensor into ``out`` and return it.

        Each block of each file is verified once, in threads beside the reading; where this raises, ``out`` holds
        anything.

        Args:
            out: any strides and device; floating dtypes convert into each other.
            offset: where the box of ``out``'s shape starts; None wants the whole tensor.

        Raises:
            CheckpointError: no such tensor, or it does not have this box or a dtype of this kind.
            DamagedError: a file's content is not what was written.
        """
        stored = self._stored(key)
        box: Box = ((0,) * out.dim() if offset is None else tuple(offset), tuple(out.shape))
        if not _inside(stored.shape, box) or (offset is None and box[1] != stored.shape):
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
            if verify:
                _read_verified(key, entry, shard, target, inside)
            else:
                read_box(entry, target, inside)
        return out

    def _stored(self, key: str) -> _Stored:
        if key not in self._tensors:
            raise CheckpointError(f"{self.path}: there is no tensor {key!r} in it")
        return self._tensors[key]


def _read_verified(key: str, entry: TensorEntry, shard: _Shard, out: Tensor, inside: Sequence[int]) -> None:
    """``read_box``, and check those blocks of the file that it touches, and of its header, not checked before."""
    pitches = [math.prod(entry.shape[dim + 1 :]) * entry.dtype.itemsize for dim in range(len(entry.shape))]
    first = entry.offset + sum(index * pitch for index, pitch in zip(inside, pitches, strict=True))
    steps = sum((count - 1) * pitch for count, pitch in zip(out.shape, pitches, strict=True))
    touched = {*_blocks(first, first + steps + entry.dtype.itemsize), *_blocks(0, shard.header_end)}
    pending = sorted(touched - shard.verified)

    def check(block: int) -> None:
        start, stop = block * BLOCK, min((block + 1) * BLOCK, shard.size)
        with open_regular(shard.path) as fd:
            digest = hash_range(fd, start, stop, shard.path)
        if digest != shard.blocks[block]:
            raise DamagedError(
                f"{shard.path}: damaged between bytes {start} and {stop} (SHA-256 differs), in tensor {key!r}"
            )
        shard.verified.add(block)

    if len(pending) < 2:
        for block in pending:
            check(block)
        read_box(entry, out, inside)
        return
    with ThreadPoolExecutor(min(hash_workers(), len(pending))) as pool:
        checks = pool.map(check, pending)
        read_box(entry, out, inside)
        for _ in checks:
            pass


def _blocks(start: int, stop: int) -> range:
    return range(start // BLOCK, -(-stop // BLOCK))


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint directory and check everything but the tensors' bytes.

    Raises:
        CheckpointError: not a checkpoint, of a newer version, or not readable.
        DamagedError: manifest or headers damaged, a shard missing or of another size, pieces that do not fit.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    if not path.is_file():
        raise DamagedError(f"{directory}: {MANIFEST} is missing; this is no complete checkpoint")
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: expected a JSON object")
    expected = content.pop("sha256", None)
    if hashlib.sha256(_encode(content, path)).hexdigest() != expected:
        raise DamagedError(f"{path}: damaged: its SHA-256 is not the one it states")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {content.get('version')!r} is not known here, only {VERSION}; upgrade")
    try:
        shards = dict(_open_shards(directory, content["files"]))
        tensors = dict(_open_tensors(path, content["tensors"], shards))
        metadata = content["metadata"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise DamagedError(f"{path}: not a manifest: {type(error).__name__} {error}") from None
    return Checkpoint(directory, metadata, tensors)


def _open_shards(directory: Path, files: Any) -> Iterator[tuple[str, tuple[_Shard, dict[str, TensorEntry]]]]:
    for name, file in files.items():
        path = directory / name
        with storage_errors(path, "read"):
            if Path(name).name != name or not name.endswith(".safetensors") or path.is_symlink():
                raise DamagedError(f"{directory / MANIFEST}: file {name!r} is not a plain safetensors file beside it")
            if not path.is_file():
                raise DamagedError(f"{path}: missing; the checkpoint is not complete")
            size, blocks = path.stat().st_size, file["blocks"]
        if size != file["size"]:
            raise DamagedError(f"{path}: truncated or changed: expected {file['size']} bytes, found {size}")
        if not isinstance(blocks, list) or len(blocks) != len(_blocks(0, size)):
            raise DamagedError(f"{directory / MANIFEST}: blocks of {name!r} do not fit its {size} bytes")
        entries = read_header(path)
        header_end = size - sum(entry.nbytes for entry in entries.values())
        yield name, (_Shard(path, blocks, size, header_end), entries)


def _open_tensors(
    path: Path, tensors: Any, shards: Mapping[str, tuple[_Shard, dict[str, TensorEntry]]]
) -> Iterator[tuple[str, _Stored]]:
    used = set()
    for key, tensor in tensors.items():
        dtype, shape = DTYPES[tensor["dtype"]], tensor["shape"]
        pieces: list[tuple[Box, TensorEntry, _Shard]] = []
        for piece in tensor["pieces"]:
            if not all(is_index_list(value) for value in (shape, piece["offset"], piece["shape"])):
                raise DamagedError(f"{path}: tensor {key!r}: shapes and offsets must be lists of whole numbers")
            shard, entries = shards[piece["file"]]
            entry = entries.get(piece["name"])
            if entry is None or entry.dtype != dtype or list(entry.shape) != piece["shape"]:
                raise DamagedError(f"{shard.path}: {piece['name']!r} is missing or not as {MANIFEST} says")
            if (piece["file"], piece["name"]) in used:
                raise DamagedError(f"{path}: {piece['name']!r} of {piece['file']} is used twice")
            used.add((piece["file"], piece["name"]))
            pieces.append(((piece["offset"], piece["shape"]), entry, shard))
        problem = tiling_problem(shape, [box for box, _, _ in pieces])
        if problem:
            raise DamagedError(f"{path}: tensor {key!r}: {problem}")
        yield key, _Stored(dtype, tuple(shape), pieces)


# ------------------------------------------------------------------------------------------------------ resume


def latest_checkpoint(parent: str | os.PathLike[str], loud: Callable[[str], None]) -> Path | None:
    """The ``step-N`` of ``parent`` with the highest N that has a manifest; ``loud`` is told of those that have none."""
    for _, path in reversed(numbered_directories(parent)):
        if (path / MANIFEST).is_file():
            return path
        loud(f"{path}: {MANIFEST} is missing; passed over")
    return None


def load_latest(
    parent: str | os.PathLike[str],
    load: Callable[[Checkpoint], T],
    report: Callable[[str], None],
    *,
    rank: int = 0,
    gather: Gather | None = None,
) -> T | None:
    """``load`` of the newest undamaged ``step-N`` of ``parent``; None where there is no checkpoint at all.

    A damaged one is renamed ``step-N.damaged-*``, ``report`` is told, and the one before it is tried. Only damage
    does this: any other error (a checkpoint of another model, no permission) leaves all in place and is raised.

    Args:
        load: reads what it wants; with several ranks it must not communicate, since it may fail on one of them.
        gather: as for ``write_checkpoint``; all ranks then take the same checkpoint.

    Raises:
        CheckpointError: there were checkpoints, but each was damaged; and whatever ``load`` raises but damage.
    """
    names = _together(gather, lambda: [str(path) for _, path in numbered_directories(parent)] if rank == 0 else [])[0]
    for path in map(Path, reversed(names)):
        loaded: list[T] = []

        def attempt(path: Path = path, loaded: list[T] = loaded) -> str | None:
            try:
                loaded.append(load(open_checkpoint(path)))
            except DamagedError as error:
                return str(error)
            return None

        problems = [problem for problem in _together(gather, attempt) if problem is not None]
        if not problems:
            return loaded[0]
        moved = _together(gather, lambda path=path: str(mark_damaged(path)) if rank == 0 else None)[0]  # type: ignore[misc]
        report(f"DAMAGED CHECKPOINT: {problems[0]}; moved to {moved}, falling back to the one before")
    if names:
        raise CheckpointError(f"{parent}: every checkpoint in it is damaged; start without resuming, in a new output")
    return None
