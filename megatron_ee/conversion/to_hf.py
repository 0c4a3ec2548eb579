"""Writes a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_ee.checkpoint.adapter import INCLUDED
from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.hf_directory import INDEX, SINGLE
from megatron_ee.checkpoint.outputs import OutputDirectory, OutputFile, Written, split_parts, whole_part
from megatron_ee.conversion.to_adapter import adapter_file, describe
from megatron_ee.errors import CheckpointError

SHARD = 5 * 10**9  # bytes, as in transformers


def to_hf(contents: Contents, *, shard: int = SHARD) -> OutputDirectory:
    """Plan the output: the backbone in its released names and dtypes, and its exits as an adapter in ``adapter/``.

    Quantised weights stay as they are. A multimodal release's vision tensors are copied.

    Args:
        contents: to write.
        shard: maximum bytes of tensors per file (one tensor may be larger).

    Raises:
        CheckpointError: there is no backbone.
    """
    if not contents.backbone:
        raise CheckpointError(f"{contents.source}: holds exits but no backbone; give the model with --model")
    tensors = {**contents.stored_backbone, **contents.non_weights}
    if contents.spelling is not None:
        tensors = {contents.spelling.released(name): tensor for name, tensor in tensors.items()}
    tensors |= contents.vision
    runs = list(split_parts([whole_part(name, tensor) for name, tensor in tensors.items()], shard))
    if len(runs) == 1:
        files = [OutputFile(SINGLE, runs[0])]
    else:
        count = len(runs)
        files = [OutputFile(f"model-{n:05}-of-{count:05}.safetensors", run) for n, run in enumerate(runs, start=1)]
    backbone = tuple(files)
    if contents.exits:
        files.append(adapter_file(contents, f"{INCLUDED}/"))

    def finish(directory: Path, written: Mapping[str, Written]) -> dict[str, bytes]:
        small = describe(contents, directory / INCLUDED, f"{INCLUDED}/") if contents.exits else {}
        if len(backbone) > 1:
            small[INDEX] = _index(backbone)
        return small

    return OutputDirectory("Hugging Face model", tuple(files), contents.assets, finish)


def _index(files: tuple[OutputFile, ...]) -> bytes:
    weight_map = {part.name: file.name for file in files for part in file.parts}
    content = {
        "metadata": {"total_size": sum(file.nbytes for file in files)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(content, indent=2).encode() + b"\n"
