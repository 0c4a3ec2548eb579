"""The adapter: the exits alone, in released names, independent of the layout they were trained in.

``exits.safetensors`` holds what was trained, as ``exits.<layer>.<released name>``; ``exits.json`` says which exits
they are and which backbone, by hash, they belong to.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from megatron_ee.checkpoint.atomic import current_directory, replace_directory, write_file
from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.loading import ReleasedModel, load_frozen_norms
from megatron_ee.checkpoint.names import Source, blocks, exit_saved_sources
from megatron_ee.checkpoint.safetensors_file import TensorEntry, read_box, read_header, read_json, write_safetensors
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import Body, Head
from megatron_ee.errors import CheckpointError
from megatron_ee.model.exits import Exit

VERSION = 1
WEIGHTS, DESCRIPTION = "exits.safetensors", "exits.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter's description, checked; its weights stay on disk.

    Attributes:
        path: the directory.
        exits: in the order of their layers.
        backbone_sha256: hash of the backbone it was made for.
        base_model: where that backbone was.
        steps: tuning steps behind it.
        weights: every tensor by name.
    """

    path: Path
    exits: tuple[ExitSpec, ...]
    backbone_sha256: str
    base_model: str
    steps: int
    weights: dict[str, TensorEntry]


def save_adapter(
    path: Path, exits: Sequence[Exit], *, base_model: str, backbone_sha256: str, steps: int, extra: dict[str, Any]
) -> None:
    """Write the adapter directory ``path``; an older one there is replaced in one move.

    Raises:
        CheckpointError: it cannot be written.
    """
    with replace_directory(path) as directory:
        write_safetensors(directory / WEIGHTS, dict(_whole_tensors(exits)), {"format": "pt"})
        description = {
            "version": VERSION,
            "base_model": base_model,
            "backbone_sha256": backbone_sha256,
            "steps": steps,
            "exits": [dataclasses.asdict(exit_.spec) for exit_ in exits],
            "files": {WEIGHTS: file_sha256(directory / WEIGHTS)},
            **extra,
        }
        write_file(directory / DESCRIPTION, json.dumps(description, indent=2).encode() + b"\n")


def open_adapter(path: str | Path, *, verify: bool = True) -> Adapter:
    """Read an adapter's description and headers, and by default check the weights' digest.

    Raises:
        CheckpointError: not an adapter, of a later version, incomplete, or damaged; the message names the file.
    """
    directory = current_directory(path)
    where = directory / DESCRIPTION
    if not where.is_file():
        raise CheckpointError(f"{directory}: no {DESCRIPTION}; give an adapter directory as tune writes it")
    content = read_json(where)
    try:
        if content["version"] != VERSION:
            raise CheckpointError(f"{where}: version {content['version']!r}; this version reads {VERSION}")
        exits = tuple(_spec(fields) for fields in content["exits"])
        adapter = Adapter(
            directory,
            exits,
            str(content["backbone_sha256"]),
            str(content["base_model"]),
            int(content["steps"]),
            read_header(directory / WEIGHTS),
        )
        digest = content["files"][WEIGHTS]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: not an adapter's description: {type(error).__name__} {error}") from None
    if [spec.layer for spec in exits] != sorted({spec.layer for spec in exits}) or not exits:
        raise CheckpointError(f"{where}: exits must be listed once each, in the order of their layers")
    if verify and file_sha256(directory / WEIGHTS) != digest:
        raise CheckpointError(f"{directory / WEIGHTS}: damaged: its SHA-256 is not the one in {DESCRIPTION}")
    return adapter


def check_backbone(adapter: Adapter, backbone_sha256: str, model: str | Path) -> None:
    """Refuse a backbone that the adapter was not made for.

    Raises:
        CheckpointError: the hashes differ.
    """
    if adapter.backbone_sha256 != backbone_sha256:
        raise CheckpointError(
            f"{adapter.path}: made for the backbone {adapter.backbone_sha256[:16]}... ({adapter.base_model}), "
            f"but {model} is {backbone_sha256[:16]}...; exits fit only the weights they were tuned on"
        )


def load_exits(exits: Iterable[Exit], adapter: Adapter, model: ReleasedModel) -> None:
    """Fill exits from an adapter, and what they hold frozen from the model.

    Raises:
        CheckpointError: the adapter has no such exit, another kind of it, or a tensor is missing or mis-shaped.
    """
    known = {spec.layer: spec for spec in adapter.exits}
    with torch.no_grad():
        for exit_ in exits:
            _check_same_kind(exit_.spec, known.get(exit_.spec.layer), adapter)
            load_frozen_norms(exit_, model)
            for parameter, source in exit_saved_sources(exit_):
                _read(parameter, source, exit_, adapter)


def _read(parameter: Tensor, source: Source, exit_: Exit, adapter: Adapter) -> None:
    setup = exit_.setup
    if source.kind == "vocabulary":
        parameter.zero_()
    for block in blocks(parameter, source, setup.architecture, setup.groups.tensor.rank(), setup.groups.tensor.size()):
        entry = adapter.weights.get(block.name)
        if entry is None:
            raise CheckpointError(f"{adapter.path / WEIGHTS}: tensor {block.name!r} is missing")
        if entry.shape != block.shape:
            raise CheckpointError(
                f"{adapter.path / WEIGHTS}: tensor {block.name!r} has shape {list(entry.shape)}, "
                f"but this model makes it {list(block.shape)}"
            )
        read_box(entry, block.tensor, block.offset)


def _check_same_kind(wanted: ExitSpec, found: ExitSpec | None, adapter: Adapter) -> None:
    where = adapter.path / DESCRIPTION
    if found is None:
        layers = ", ".join(str(spec.layer) for spec in adapter.exits)
        raise CheckpointError(f"{where}: no exit after layer {wanted.layer}; it has them after {layers}")
    for name in ("body", "head") + (("rank",) if wanted.head == "low_rank" else ()):
        if getattr(found, name) != getattr(wanted, name):
            raise CheckpointError(
                f"{where}: the exit after layer {wanted.layer} has {name} {getattr(found, name)!r}, "
                f"not {getattr(wanted, name)!r}"
            )


def _spec(fields: dict[str, Any]) -> ExitSpec:
    spec = ExitSpec(**fields)
    if spec.body not in get_args(Body) or spec.head not in get_args(Head):
        raise ValueError(f"body {spec.body!r} or head {spec.head!r} is unknown")
    if not (type(spec.layer) is int and spec.layer >= 1 and type(spec.rank) is int and spec.rank >= 1):
        raise ValueError(f"layer {spec.layer!r} or rank {spec.rank!r} is not a positive whole number")
    return spec


def _whole_tensors(exits: Iterable[Exit]) -> Iterator[tuple[str, Tensor]]:
    """Every trained tensor in released names and shapes."""
    for exit_ in exits:
        setup = exit_.setup
        tensor = setup.groups.tensor
        assert tensor.size() == 1, "an adapter is gathered over tensor-parallel ranks before it is written"
        for parameter, source in exit_saved_sources(exit_):
            parts: dict[str, Tensor] = {}
            for block in blocks(parameter, source, setup.architecture, tensor.rank(), tensor.size()):
                if block.tensor.shape == block.shape:
                    parts[block.name] = block.tensor
                    continue
                whole = parts.setdefault(block.name, torch.empty(block.shape, dtype=block.tensor.dtype))
                whole[tuple(slice(o, o + n) for o, n in zip(block.offset, block.tensor.shape, strict=True))] = (
                    block.tensor
                )
            yield from parts.items()
