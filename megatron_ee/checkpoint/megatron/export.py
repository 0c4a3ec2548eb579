"""A backbone written as Megatron-LM's own distributed checkpoint (``torch_dist``), a few MiB at a time.

The layers are stacked under one key each, which is what ``GPTModel.sharded_state_dict`` asks for by default, and no
tensor is cut for any tensor-parallel size: whoever loads it reads the boxes that it needs. The directory is called
``release``, which Megatron-LM takes for weights that no training run stands behind: no optimizer is looked for.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ee.checkpoint.atomic import new_directory, new_file, write_all, write_file
from megatron_ee.checkpoint.conversion.contents import Contents
from megatron_ee.checkpoint.failpoints import failpoint
from megatron_ee.checkpoint.megatron.names import LAYERS, fuse, parameters
from megatron_ee.checkpoint.megatron.settings import to_args
from megatron_ee.checkpoint.megatron.torch_dist import COMMON, RELEASED, SETTINGS, TRACKER
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.architecture import Architecture
from megatron_ee.errors import CheckpointError, storage_errors

EXTRA = "__0_2.distcp"
DIVISIBLE = 128
"""The vocabulary is padded to a multiple of it, as Megatron does without tensor parallelism; loading pads further."""
ITEM = 8 * 2**20  # bytes of a tensor that are in memory, and become one item of a file, at a time
MODULES = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer that ask for an extra state, or may: which of them do depends on Transformer Engine's release.

None has any without FP8, but loading fails where one is missing; one too many is not looked at.
"""
WRITERS = 2
"""Files written at a time: one is read for while the other is written."""


@dataclass(frozen=True)
class Item:
    """A box of a tensor, whole rows of it, that becomes one item of a file.

    Attributes:
        key: of the whole tensor.
        offset: of the box in it.
        shape: of the box, of as many dimensions.
        tensor: what it is a box of; where layers are stacked, that of the layer, which has a dimension less.
        released: bytes of it that are not padding.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    tensor: StoredTensor
    released: int


def export_torch_dist(contents: Contents, output: Path, *, advance: Callable[[int], None] | None = None) -> None:
    """Write the backbone of ``contents`` to the new directory ``output``, with its small files in ``huggingface/``.

    Exits are left out: Megatron has no place for them.

    Args:
        advance: called with the number of bytes of released tensors just written.

    Raises:
        CheckpointError: there is no backbone, ``output`` exists, or something cannot be read or written; then nothing
            is left behind.
    """
    arch = contents.architecture
    if arch is None or not contents.backbone:
        raise CheckpointError(f"{contents.source}: holds exits but no backbone; give the model with --model")
    vocabulary = -(-arch.vocab_size // DIVISIBLE) * DIVISIBLE
    shapes, items = _plan(contents, arch, vocabulary)
    with new_directory(output) as temporary:
        _check_space(items, temporary)
        directory = temporary / "release"
        with storage_errors(directory, "write"):
            (directory / RELEASED).mkdir(parents=True)
        places = _write_items(items, directory, advance or (lambda count: None))
        _write_metadata(directory, shapes, items, places, arch.num_layers)
        for name, source in contents.assets.items():
            with storage_errors(directory / RELEASED / name, "write"):
                (directory / RELEASED / name).parent.mkdir(parents=True, exist_ok=True)
                content = source if isinstance(source, bytes) else source.read_bytes()
            write_file(directory / RELEASED / name, content)
        write_file(directory / COMMON, _saved(_common(arch, vocabulary)))
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        common = {"common_backend": "torch", "common_backend_version": 1}
        write_file(directory / SETTINGS, json.dumps(backend | common).encode())
        write_file(temporary / TRACKER, b"release")
        failpoint("convert.rename")


def _plan(
    contents: Contents, arch: Architecture, vocabulary: int
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], list[Item]]:
    """Dtype and shape of every tensor by key, and the items that they are written as."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    items: list[Item] = []
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
            real = sum(contents.backbone[name].shape[0] for name in source.names)
            lead = (layer,) if parameter.stacked else ()
            items += list(_cut(parameter.key, lead, tensor, real))
    return shapes, items


def _cut(key: str, lead: tuple[int, ...], tensor: StoredTensor, real: int) -> Iterator[Item]:
    """Runs of rows of at most ``ITEM`` bytes; the first ``real`` rows are not padding."""
    row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    step = max(1, ITEM // row)
    for first in range(0, tensor.shape[0], step):
        count = min(step, tensor.shape[0] - first)
        inner = (0,) * (len(tensor.shape) - 1)
        shape = (*(1 for _ in lead), count, *tensor.shape[1:])
        yield Item(key, (*lead, first, *inner), shape, tensor, max(0, min(first + count, real) - first) * row)


def _check_space(items: Sequence[Item], directory: Path) -> None:
    needed = sum(math.prod(item.shape) * item.tensor.dtype.itemsize for item in items)
    with storage_errors(directory, "measure the free space"):
        free = shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(
            f"{directory.parent}: needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; "
            "free some space or choose another --output"
        )


def _write_items(items: Sequence[Item], directory: Path, advance: Callable[[int], None]) -> list[tuple[str, int, int]]:
    """Write ``*.distcp``; returns each item's file, position and length."""
    stop, lock = threading.Event(), threading.Lock()
    places: list[tuple[str, int, int]] = [("", 0, 0)] * len(items)

    def write(writer: int) -> None:
        name, position = f"__0_{writer}.distcp", 0
        buffer = io.BytesIO()  # one for all items: new ones would leave holes in memory
        with new_file(directory / name) as fd:
            for number in range(writer, len(items), WRITERS):
                if stop.is_set():
                    raise CheckpointError(f"{directory / name}: not finished, because another file failed")
                failpoint("convert.file")
                length = _save_item(items[number], buffer)
                with buffer.getbuffer() as data:
                    write_all(fd, data[:length])
                places[number] = name, position, length
                position += length
                with lock:
                    advance(items[number].released)

    with ThreadPoolExecutor(WRITERS) as pool:
        futures = [pool.submit(write, writer) for writer in range(WRITERS)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            raise
    return places


def _save_item(item: Item, buffer: io.BytesIO) -> int:
    """Write what ``torch.save`` makes of an item to the start of ``buffer``; returns its length.

    Not straight to the file: where the disk is full, torch's writer ends the process.
    """
    values = torch.empty(item.shape, dtype=item.tensor.dtype)
    stacked = len(item.shape) - len(item.tensor.shape)
    item.tensor.read(values[0] if stacked else values, item.offset[stacked:])
    buffer.seek(0)
    torch.save(values, buffer)
    return buffer.tell()


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _write_metadata(
    directory: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    items: Sequence[Item],
    places: Sequence[tuple[str, int, int]],
    num_layers: int,
) -> None:
    """Write ``.metadata``, with torch's own classes and writer, and the one extra state that all modules share."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.storage import WriteResult

    class Writer(FileSystemWriter):
        def storage_meta(self) -> None:
            """Neither the temporary directory's name nor a random number: equal models give equal files."""

    tensors = {
        key: dcp.TensorStorageMetadata(dcp.TensorProperties(dtype), torch.Size(shape), [])
        for key, (dtype, shape) in shapes.items()
    }
    results = []
    for item, (name, position, length) in zip(items, places, strict=True):
        chunks = tensors[item.key].chunks
        index = dcp.MetadataIndex(item.key, item.offset, len(chunks))
        chunks.append(dcp.ChunkStorageMetadata(torch.Size(item.offset), torch.Size(item.shape)))
        results.append(WriteResult(index, length, _StorageInfo(name, position, length)))
    nothing = _saved([None])
    write_file(directory / EXTRA, nothing)
    objects = list(_extra_states(num_layers))
    results += [
        WriteResult(dcp.MetadataIndex(key), len(nothing), _StorageInfo(EXTRA, 0, len(nothing))) for key in objects
    ]
    described: dict[str, dcp.STORAGE_TYPES] = {key: dcp.BytesStorageMetadata() for key in objects}
    described.update(tensors)
    with storage_errors(directory, "write"):
        Writer(directory).finish(dcp.Metadata(described), [results])


def _extra_states(num_layers: int) -> Iterator[str]:
    """Keys of extra states, as ``ShardedObject.unique_key`` makes them: its number and how many there are."""
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
        # How the keys are, for those who ask ``sharded_state_dict`` for another way by default.
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False},
    }
