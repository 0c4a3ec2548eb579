"""Writes a backbone as Megatron-LM's distributed checkpoint (``torch_dist``), a few MiB at a time.

The tensors of all layers are stacked under one key per parameter, the default of ``GPTModel.sharded_state_dict``. No
tensor is split for a tensor-parallel size; a loading rank reads the boxes that it needs. The directory is called
``release``: Megatron-LM then does not expect optimizer state.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ee.checkpoint.atomic import new_file, write_all
from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.outputs import OnBytes, OutputDirectory, OutputFile, Part, Watch, Written, split_parts
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.architecture import Architecture
from megatron_ee.errors import CheckpointError, storage_errors
from megatron_ee.importers.megatron.names import LAYERS, fuse, parameters
from megatron_ee.importers.megatron.settings import check_expressible, to_args
from megatron_ee.importers.megatron.torch_dist import COMMON, RELEASED, SETTINGS, TRACKER

RELEASE = "release"
# Bytes per file: small enough to write several files at a time and to repeat little after an interruption.
SHARD = 2 * 2**30
DIVISIBLE = 128
"""The vocabulary is padded to a multiple of this, as in Megatron without tensor parallelism. Loading may pad
further."""
ITEM = 8 * 2**20  # bytes of a tensor that are in memory at a time and become one item of a file
MODULES = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer that may have an extra state, depending on Transformer Engine's release.

Without FP8 all are empty, but loading fails if one is missing. Additional ones are ignored.
"""


@dataclass(frozen=True)
class ItemLocation:
    """Location of a part: its file, and its position and length in the file, in bytes."""

    file: str
    position: int
    length: int


def to_torch_dist(contents: Contents, *, shard: int = SHARD) -> OutputDirectory:
    """Plan the output: the backbone of ``contents`` in ``release/``, its small files in ``release/huggingface/``.

    Exits are left out, because Megatron's format cannot hold them.

    Args:
        contents: to export.
        shard: maximum bytes of tensors per file.

    Raises:
        CheckpointError: there is no backbone, Megatron does not support it, or stacked tensors differ in dtype.
    """
    arch = contents.architecture
    if arch is None or not contents.backbone:
        raise CheckpointError(f"{contents.source}: holds exits but no backbone; give the model with --model")
    check_expressible(arch, str(contents.source))
    vocabulary = -(-arch.vocab_size // DIVISIBLE) * DIVISIBLE
    shapes, parts = _plan(contents, arch, vocabulary)
    runs = list(split_parts(parts, shard))
    files = tuple(OutputFile(f"{RELEASE}/__0_{number}.distcp", run, write_items) for number, run in enumerate(runs))

    def finish(directory: Path, written: Mapping[str, Written]) -> dict[str, bytes]:
        extra = f"__0_{len(files)}.distcp"
        _write_metadata(directory / RELEASE, shapes, _locations(files), extra, arch.num_layers)
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        common = {"common_backend": "torch", "common_backend_version": 1}
        return {
            f"{RELEASE}/{extra}": _saved([None]),
            f"{RELEASE}/{COMMON}": _saved(_common(arch, vocabulary)),
            f"{RELEASE}/{SETTINGS}": json.dumps(backend | common).encode(),
            TRACKER: RELEASE.encode(),
        }

    assets = {f"{RELEASE}/{RELEASED}/{name}": source for name, source in contents.assets.items()}
    return OutputDirectory("Megatron torch_dist checkpoint", files, assets, finish)


def _plan(
    contents: Contents, arch: Architecture, vocabulary: int
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], list[Part]]:
    """Dtype and shape of every tensor by key, and the boxes. Each box becomes one item of a file."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    parts: list[Part] = []
    for parameter in parameters(arch):
        rows = vocabulary if parameter.sources[0].kind == "vocabulary" else 0
        for layer, source in enumerate(parameter.sources):
            tensor = fuse(source, contents.backbone, arch, rows)
            whole = (len(parameter.sources), *tensor.shape) if parameter.stacked else tensor.shape
            if shapes.setdefault(parameter.key, (tensor.dtype, whole)) != (tensor.dtype, whole):
                raise CheckpointError(
                    f"{contents.source}: {source.names[0]} is {tensor.dtype}, unlike those of other layers, which "
                    "Megatron stacks with it; convert them to one dtype first"
                )
            parts += list(_cut(parameter.key, (layer,) if parameter.stacked else (), tensor))
    return shapes, parts


def _cut(key: str, lead: tuple[int, ...], tensor: StoredTensor) -> Iterator[Part]:
    """Split a tensor into runs of rows of at most ``ITEM`` bytes. ``lead`` is the layer's index in a stacked tensor."""
    step = max(1, ITEM // (math.prod(tensor.shape[1:]) * tensor.dtype.itemsize))
    for first in range(0, tensor.shape[0], step):
        inner = (0,) * (len(tensor.shape) - 1)
        shape = (*(1 for _ in lead), min(step, tensor.shape[0] - first), *tensor.shape[1:])
        yield Part(key, key, tensor, (*lead, first, *inner), shape)


def write_items(path: Path, parts: Sequence[Part], watch: Watch, on_bytes: OnBytes) -> None:
    """Write a ``*.distcp`` file: one ``torch.save`` per part, one after another. Like ``outputs.write_parts``."""
    buffer = io.BytesIO()  # one buffer for all items, which avoids fragmentation
    with new_file(path) as fd:
        for part, values in zip(parts, watch(_values(part) for part in parts), strict=True):
            length = _save(values, buffer)
            assert length == _saved_length(part.shape, values.dtype), "where items are follows from their shapes"
            # Views that an exception keeps alive would crash the garbage collector of Python 3.12.1.
            with buffer.getbuffer() as data, data[:length] as item:
                write_all(fd, item)
                on_bytes(item)


def _values(part: Part) -> Tensor:
    values = torch.empty(part.shape, dtype=part.tensor.dtype)
    stacked = len(part.shape) - len(part.tensor.shape)
    part.tensor.read(values[0] if stacked else values, part.offset[stacked:])
    return values


def _save(values: Tensor, buffer: io.BytesIO) -> int:
    """Write an item with ``torch.save`` to the start of ``buffer``. Return its length.

    Not directly to the file: if the disk is full, torch's writer ends the process.
    """
    buffer.seek(0)
    torch.save(values, buffer)  # noqa: TID251  Megatron's own format
    return buffer.tell()


@functools.lru_cache(maxsize=256)
def _saved_length(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return _save(torch.zeros(shape, dtype=dtype), io.BytesIO())


def _locations(files: Sequence[OutputFile]) -> Iterator[tuple[Part, ItemLocation]]:
    """Yield every part and its location, in the order of the files.

    The locations depend only on the parts, so they also hold for files that an earlier run finished.
    """
    for file in files:
        position = 0
        for part in file.parts:
            length = _saved_length(part.shape, part.tensor.dtype)
            yield part, ItemLocation(Path(file.name).name, position, length)
            position += length


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)  # noqa: TID251  Megatron's own format
    return buffer.getvalue()


def _write_metadata(
    directory: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    locations: Iterator[tuple[Part, ItemLocation]],
    extra: str,
    num_layers: int,
) -> None:
    """Write ``.metadata``, with torch's own classes and writer. All modules share the one extra state in ``extra``."""
    from torch.distributed.checkpoint import FileSystemWriter  # noqa: TID251  writes only
    from torch.distributed.checkpoint import metadata as dcp  # noqa: TID251  writes only
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: TID251  writes only
    from torch.distributed.checkpoint.storage import WriteResult  # noqa: TID251  writes only

    class Writer(FileSystemWriter):
        def storage_meta(self) -> None:
            """Set constants instead of the temporary directory's name and a random number, for reproducible files."""

    tensors = {
        key: dcp.TensorStorageMetadata(dcp.TensorProperties(dtype), torch.Size(shape), [])
        for key, (dtype, shape) in shapes.items()
    }
    results = []
    for part, location in locations:
        chunks = tensors[part.key].chunks
        index = dcp.MetadataIndex(part.key, part.offset, len(chunks))
        chunks.append(dcp.ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.shape)))
        results.append(
            WriteResult(index, location.length, _StorageInfo(location.file, location.position, location.length))
        )
    nothing = len(_saved([None]))
    objects = list(_extra_states(num_layers))
    results += [WriteResult(dcp.MetadataIndex(key), nothing, _StorageInfo(extra, 0, nothing)) for key in objects]
    described: dict[str, dcp.STORAGE_TYPES] = {key: dcp.BytesStorageMetadata() for key in objects}
    described.update(tensors)
    with storage_errors(directory, "write"):
        Writer(directory).finish(dcp.Metadata(described), [results])


def _extra_states(num_layers: int) -> Iterator[str]:
    """Keys of extra states in the form of ``ShardedObject.unique_key``, with index and count."""
    yield "decoder.final_layernorm._extra_state/shard_0_1"
    for layer in range(num_layers):
        for module in MODULES:
            yield f"{LAYERS}.{module}._extra_state/shard_{layer}_{num_layers}"


def _common(arch: Architecture, vocabulary: int) -> dict[str, Any]:
    """Content of ``common.pt``."""
    return {
        "args": argparse.Namespace(**to_args(arch, vocabulary)),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        # The form of the keys, for programs whose default differs.
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False},
    }
