"""Writes a parallel checkpoint: sharded for one layout, loadable in any."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_ee.checkpoint.adapter import SETTINGS, describe_corpora
from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.manifest import MANIFEST, ShardContent, manifest_bytes, piece_name
from megatron_ee.checkpoint.outputs import OutputDirectory, OutputFile, Part, Written, split_parts
from megatron_ee.checkpoint.safetensors_file import DTYPE_NAMES
from megatron_ee.checkpoint.saved_model import KIND
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.check import check_pipeline
from megatron_ee.conversion.slices import rank_boxes
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.families.weights import FINAL_NORM, LM_HEAD
from megatron_ee.parallel.layout import even_layout

# Bytes per file: small enough to write several files at a time and to repeat little after an interruption.
SHARD = 2 * 2**30


def to_parallel(
    contents: Contents, *, tensor: int = 1, stages: Sequence[int] = (), shard: int = SHARD
) -> OutputDirectory:
    """Plan the output: the backbone and its exits.

    Args:
        contents: to write.
        tensor: tensor-parallel size of the layout.
        stages: number of layers per pipeline stage; empty for one stage.
        shard: maximum bytes of tensors per file (one piece may be larger).

    Raises:
        ConfigError: the model cannot be split like this.
        CheckpointError: there is no backbone.
    """
    arch = contents.architecture
    if arch is None:
        raise CheckpointError(f"{contents.source}: holds exits but no backbone; give the model with --model")
    check_cut(arch, tensor, stages or [arch.num_layers])
    files = []
    for stage, layers in enumerate(_runs(stages or [arch.num_layers])):
        for rank in range(tensor):
            parts = list(_parts(contents, arch, layers, rank, tensor))
            for number, run in enumerate(split_parts(parts, shard)):
                files.append(OutputFile(f"shard-p{stage:02}-t{rank:02}-{number:03}.safetensors", run))

    def finish(directory: Path, written: Mapping[str, Written]) -> dict[str, bytes]:
        assets = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in contents.assets}
        metadata = {
            "kind": KIND,
            "assets": assets,
            "layout": {"tensor": tensor, "stages": list(stages or [arch.num_layers])},
            "exits": [dataclasses.asdict(spec) for spec in contents.exits],
            "base_model": contents.base_model,
            "backbone_sha256": contents.backbone_sha256,
            SETTINGS: contents.settings,
            "steps": contents.steps,
            **describe_corpora(contents.corpora),
        }
        shards = [_shard(file, written[file.name]) for file in files]
        return {MANIFEST: manifest_bytes(directory, shards, metadata)}

    what = f"parallel checkpoint (tensor {tensor}, stages {len(stages) or 1})"
    return OutputDirectory(what, tuple(files), contents.assets, finish)


def even_stages(num_layers: int, pipeline: int) -> list[int]:
    """Layers per stage, as even as possible.

    Raises:
        ConfigError: there are more stages than layers.
    """
    check_pipeline(num_layers, pipeline, "--pipeline")
    return [len(stage.layers) for stage in even_layout(num_layers, pipeline).stages]


def check_cut(arch: Architecture, tensor: int, stages: Sequence[int]) -> None:
    """Refuse sizes that do not divide the model.

    Raises:
        ConfigError: they do not; the message names the option.
    """
    if sum(stages) != arch.num_layers or min(stages) < 1:
        raise ConfigError(f"--stages: {list(stages)} do not add up to the model's {arch.num_layers} layers")
    for what, size in (("key-value heads", arch.num_kv_heads), ("MLP columns", arch.ffn_size)):
        if size % tensor:
            raise ConfigError(f"--tensor: {tensor} does not divide the model's {size} {what}")


def _runs(stages: Sequence[int]) -> Iterator[range]:
    first = 1
    for count in stages:
        yield range(first, first + count)
        first += count


_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXIT = re.compile(r"exits\.(\d+)\.")


def _layer_of(name: str, arch: Architecture) -> int:
    """The layer (from 1) whose stage holds a tensor: the first layer for the embedding, the last for the final exit."""
    if match := _LAYER.match(name):
        return min(int(match[1]) + 1, arch.num_layers)
    if match := _EXIT.match(name):
        return int(match[1])
    return arch.num_layers if name in (FINAL_NORM, LM_HEAD) else 1


def _parts(contents: Contents, arch: Architecture, layers: range, rank: int, size: int) -> Iterator[Part]:
    """The parts of one rank. The first rank writes tensors that all tensor-parallel ranks hold whole."""
    for name, tensor in {**contents.backbone, **contents.non_weights, **contents.exit_tensors}.items():
        if _layer_of(name, arch) not in layers:
            continue
        for offset, shape in rank_boxes(name, tensor.shape, arch, rank, size):
            box = tuple(offset), tuple(shape)
            stored = contents.quantised[name].shares(box) if name in contents.quantised else [(name, tensor, box)]
            for key, each, (start, extent) in stored:
                yield Part(piece_name(key, each.shape, start, extent), key, each, tuple(start), tuple(extent))


def _shard(file: OutputFile, written: Written) -> ShardContent:
    pieces = []
    for part in file.parts:
        pieces.append((part.key, DTYPE_NAMES[part.tensor.dtype], part.tensor.shape, part.name, part.offset, part.shape))
    return ShardContent(file.name, written.size, written.blocks, pieces)
