"""The native checkpoint format: a directory of safetensors shards, one per rank, and ``manifest.json``, written last.

A tensor has a global key, dtype and shape. It is stored as boxes (pieces) that tile it exactly, so it can be read in
any other slicing. The manifest holds the SHA-256 of every 16 MiB block of every shard (including its header), and of
itself. Blocks are verified as they are read. ``checkpoint.writing`` writes a checkpoint, ``checkpoint.store`` reads
it, and ``checkpoint.resume`` finds the one to continue from. This module holds their common parts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.errors import CheckpointError

MANIFEST = "manifest.json"
VERSION = 1
BLOCK = 16 * 2**20  # bytes per checksum
MAX_CUT = 4  # dimensions that a tensor may be split along; tensor and data parallelism split along two
MAX_NAMED = 200  # number of pieces that are searched for an overlapping pair, for the message

Box = tuple[Sequence[int], Sequence[int]]  # offset, shape


def encode(content: Any, where: Path) -> bytes:
    """Encode JSON canonically, for the manifest's own checksum.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: metadata is not JSON: {error}") from None


@dataclass(frozen=True)
class ShardContent:
    """A shard on disk, as described in the manifest.

    Attributes:
        file: its name.
        size: bytes.
        blocks: SHA-256 (hex) of each ``BLOCK`` of it.
        pieces: per tensor in it: global key, dtype in safetensors' spelling, global shape, name in the file, offset and
            shape of the box.
    """

    file: str
    size: int
    blocks: list[str]
    pieces: Sequence[tuple[str, str, Sequence[int], str, Sequence[int], Sequence[int]]]


def piece_name(key: str, global_shape: Sequence[int], offset: Sequence[int], shape: Sequence[int]) -> str:
    """Name of a box of the tensor ``key`` in its file; the key itself if the box is the whole tensor."""
    if tuple(shape) == tuple(global_shape):
        return key
    ranges = (f"{first}:{first + count}" for first, count in zip(offset, shape, strict=True))
    return f"{key}[{','.join(ranges)}]"


def manifest_bytes(where: Path, shards: Iterable[ShardContent], metadata: Mapping[str, Any]) -> bytes:
    """Build the content of ``manifest.json``.

    Args:
        where: the checkpoint, for messages.
        shards: all shards.
        metadata: JSON content to store.

    Raises:
        CheckpointError: the shards do not tile every tensor exactly, or the metadata is not JSON.
    """
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for shard in shards:
        files[shard.file] = {"size": shard.size, "blocks": shard.blocks}
        for key, dtype, shape, name, offset, extent in shard.pieces:
            tensor = tensors.setdefault(key, {"dtype": dtype, "shape": list(shape), "pieces": []})
            if (tensor["dtype"], tensor["shape"]) != (dtype, list(shape)):
                raise CheckpointError(f"{where}: tensor {key!r} has different dtypes or shapes on different ranks")
            piece = {"file": shard.file, "name": name, "offset": list(offset), "shape": list(extent)}
            tensor["pieces"].append(piece)
    for key, tensor in tensors.items():
        problem = tiling_problem(tensor["shape"], [(piece["offset"], piece["shape"]) for piece in tensor["pieces"]])
        if problem:
            raise CheckpointError(f"{where}: tensor {key!r}: {problem}")
    content = {"version": VERSION, "metadata": metadata, "files": files, "tensors": tensors}
    content = json.loads(encode(content, where))
    content["sha256"] = hashlib.sha256(encode(content, where)).hexdigest()
    return json.dumps(content, indent=1).encode("utf-8")


def tiling_problem(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """The reason why ``boxes`` do not cover ``shape`` exactly once; None if they do.

    The indicator function of a box is a sum of step functions that start at its corners, with alternating signs. Step
    functions with different starts are linearly independent. So boxes tile the tensor exactly if their signed corners
    add up to the tensor's. This takes linear time in the number of boxes, which matters because an untrusted file
    determines that number.
    """
    for offset, extent in boxes:
        if not is_inside(shape, (offset, extent)):
            return f"the piece of shape {list(extent)} at {list(offset)} is not inside shape {list(shape)}"
    cut = [dim for dim, size in enumerate(shape) if any(extent[dim] != size for _, extent in boxes)]
    if len(cut) > MAX_CUT:
        return f"its pieces are split along {len(cut)} dimensions; at most {MAX_CUT} are read"
    corners: Counter[tuple[int, ...]] = Counter()
    whole = ([0] * len(shape), shape)
    for sign, (offset, extent) in itertools.chain(((-1, whole),), ((1, box) for box in boxes)):
        ends = [(offset[dim], offset[dim] + extent[dim]) for dim in cut]
        for upper in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(end[which] for end, which in zip(ends, upper, strict=True))
            corners[corner] += sign * (-1) ** sum(upper)
    if boxes and (0 in shape or not any(corners.values())):
        return None
    for (first, one), (second, other) in itertools.combinations(boxes[:MAX_NAMED], 2):
        if intersect((first, one), (second, other)) is not None:
            return f"the pieces at {list(first)} and {list(second)} overlap"
    covered, total = sum(math.prod(extent) for _, extent in boxes), math.prod(shape)
    return f"its pieces hold {covered} of {total} elements" if covered < total else "its pieces overlap"


def is_inside(shape: Sequence[int], box: Box) -> bool:
    """Whether ``box`` has the dimensions of ``shape`` and is inside it."""
    offset, extent = box
    return len(offset) == len(extent) == len(shape) and all(
        first >= 0 and count >= 0 and first + count <= size
        for first, count, size in zip(offset, extent, shape, strict=True)
    )


def intersect(first: Box, second: Box) -> Box | None:
    """The intersection of two boxes; None if it is empty."""
    low = [max(a, b) for a, b in zip(first[0], second[0], strict=True)]
    ends = zip(first[0], first[1], second[0], second[1], strict=True)
    extent = [min(a + m, b + n) - start for start, (a, m, b, n) in zip(low, ends, strict=True)]
    return None if any(count <= 0 for count in extent) else (low, extent)
