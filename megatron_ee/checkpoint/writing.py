"""Writes a native checkpoint atomically."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ee.checkpoint.atomic import (
    begin_directory,
    commit_directory,
    write_file,
)
from megatron_ee.checkpoint.digest import BlockHasher
from megatron_ee.checkpoint.failpoints import failpoint
from megatron_ee.checkpoint.manifest import BLOCK, MANIFEST, ShardContent, encode, manifest_bytes, piece_name
from megatron_ee.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    write_safetensors,
)
from megatron_ee.errors import CheckpointError
from megatron_ee.parallel.agreement import Gather, together


@dataclass(frozen=True)
class Piece:
    """One box of a tensor, to save.

    Attributes:
        key: global key of the tensor.
        global_shape: shape of the whole tensor, without padding.
        offset: start of the box, one index per dimension.
        tensor: content of the box, with any strides and device.
    """

    key: str
    global_shape: Sequence[int]
    offset: Sequence[int]
    tensor: Tensor


def whole(key: str, tensor: Tensor) -> Piece:
    """The piece that is the whole ``tensor``."""
    return Piece(key, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def write_checkpoint(
    final: str | os.PathLike[str],
    pieces: Iterable[Piece],
    metadata: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> None:
    """Write a checkpoint directory atomically. Every rank calls this with its own pieces.

    Each rank with pieces writes ``shard-RRRR.safetensors``. Rank 0 writes the manifest and renames the directory to
    ``final``. If one rank fails, all raise.

    Args:
        final: directory of the checkpoint.
        pieces: this rank's pieces. The pieces of all ranks must tile every tensor exactly, so only one rank passes a
            tensor that several ranks hold.
        metadata: JSON content to store; rank 0's is used. NaN and infinity are not allowed.
        rank: of this process.
        world_size: number of processes.
        gather: returns the list of all ranks' objects (tuples, lists, dicts, strings and numbers) on every rank, such
            as ``all_gather_object`` over a gloo group. Needed if ``world_size`` is above 1.

    Raises:
        CheckpointError: ``final`` exists, the pieces do not fit together, or the storage fails.
    """
    if world_size > 1 and gather is None:
        raise ValueError("write_checkpoint needs gather with several ranks")
    final = Path(final)
    begun: list[str] = []

    def begin() -> str:
        encode(metadata, final)  # fail before anything is written
        failpoint("save.begin")
        if rank == 0:
            begun.append(str(begin_directory(final)))
            failpoint("save.begun")
        return begun[0] if begun else ""

    try:
        temporary = Path(together(gather, begin)[0])
        shards = together(gather, lambda: _write_shard(temporary, pieces, rank))
        if len(shards) != world_size:
            raise ValueError(f"gather returned {len(shards)} answers from {world_size} ranks")

        def finish() -> None:
            if rank == 0:
                contents = [ShardContent(**shard) for shard in shards if shard is not None]
                failpoint("save.manifest")
                write_file(temporary / MANIFEST, manifest_bytes(final, contents, metadata))
                failpoint("save.manifest-done")
                commit_directory(temporary, final)
                failpoint("save.renamed")

        together(gather, finish)
    except BaseException:
        for leftover in begun:
            shutil.rmtree(leftover, ignore_errors=True)
        raise


def _write_shard(directory: Path, pieces: Iterable[Piece], rank: int) -> dict[str, Any] | None:
    """Write this rank's shard. Return its description for the manifest, as the fields of a ``ShardContent``."""
    file = f"shard-{rank:04d}.safetensors"
    tensors: dict[str, Tensor] = {}
    described = []
    for piece in pieces:
        extent, offset = tuple(piece.tensor.shape), tuple(piece.offset)
        name = piece_name(piece.key, piece.global_shape, offset, extent)
        if name in tensors:
            raise CheckpointError(f"{directory / file}: {name!r} is given twice")
        tensors[name] = piece.tensor
        dtype = DTYPE_NAMES.get(piece.tensor.dtype, str(piece.tensor.dtype))
        described.append((piece.key, dtype, tuple(piece.global_shape), name, offset, extent))
    if not tensors:
        return None
    hasher = BlockHasher(BLOCK)

    def written(data: memoryview) -> None:
        failpoint("save.shard")
        hasher.update(data)

    write_safetensors(directory / file, tensors, on_bytes=written)
    failpoint("save.shard-done")
    return dataclasses.asdict(ShardContent(file, hasher.total, hasher.finish(), described))
