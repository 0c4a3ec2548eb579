"""Writes an adapter: the first rank gathers the exits of all ranks, one tensor at a time.

No rank holds two whole tensors at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee.checkpoint.adapter import DESCRIPTION, WEIGHTS, describe_corpora, describe_exits, open_adapter
from megatron_ee.checkpoint.atomic import replace_directory, write_json
from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.safetensors_file import write_safetensors
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.tensors import exit_saved_sources
from megatron_ee.model.names import blocks
from megatron_ee.parallel.groups import Groups


def save_adapter(
    path: Path,
    exits: Sequence[Exit],
    specs: Sequence[ExitSpec],
    groups: Groups,
    *,
    base_model: str,
    backbone_sha256: str,
    steps: int,
    settings: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter directory ``path``. An existing one is replaced atomically. Every rank calls this.

    Args:
        path: directory, written by the first rank.
        exits: hosted on this rank.
        specs: the exits of all ranks.
        groups: to gather tensors over, one at a time.
        base_model: path of the backbone.
        backbone_sha256: its hash.
        steps: number of tuning steps.
        settings: its ``SavedModel.settings``; None if they are not known.
        extra: further entries of the description.

    Raises:
        CheckpointError: it cannot be written.
    """
    gathered = gather_tensors(exits, groups)

    def write() -> None:
        with replace_directory(path) as directory:
            write_safetensors(directory / WEIGHTS, gathered.shapes, {"format": "pt"}, content=gathered.whole)
            digest = file_sha256(directory / WEIGHTS)
            description = describe_exits(specs, base_model, backbone_sha256, steps, digest, settings, extra)
            write_json(directory / DESCRIPTION, description)

    groups.together(write if groups.is_main else gathered.send)


def extract_adapter(checkpoint: Path, path: Path) -> None:
    """Write the adapter directory ``path`` from the exits in a training checkpoint; as ``save_adapter``, on one rank.

    Raises:
        CheckpointError: it cannot be read or written.
    """
    adapter = open_adapter(checkpoint)
    by_layer = sorted(adapter.weights, key=lambda name: (int(name.split(".")[1]), name))
    shapes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in ((name, adapter.weights[name]) for name in by_layer)
    }
    with replace_directory(path) as directory:
        write_safetensors(
            directory / WEIGHTS, shapes, {"format": "pt"}, content=lambda name: adapter.weights[name].slabs()
        )
        digest = file_sha256(directory / WEIGHTS)
        about = (adapter.base_model, adapter.backbone_sha256, adapter.steps, digest, adapter.settings)
        description = describe_exits(adapter.exits, *about, extra=describe_corpora(adapter.corpora))
        write_json(directory / DESCRIPTION, description)


@dataclass(frozen=True)
class _Part:
    """A box of a tensor and the rank that has it."""

    rank: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: tuple[int, ...]
    extent: tuple[int, ...]


@dataclass
class Gathered:
    """Every trained tensor under its released name and shape.

    Attributes:
        shapes: tensors without content, on the meta device, in the order in which ``whole`` must be called.
    """

    shapes: dict[str, Tensor]
    _parts: dict[str, list[_Part]]
    _own: dict[tuple[str, tuple[int, ...]], Tensor]
    _groups: Groups

    def whole(self, name: str) -> tuple[Tensor]:
        """On the first rank: the content of the next tensor, on the host, received from the other ranks."""
        tensor = torch.empty_like(self.shapes[name], device="cpu")
        for part in self._parts[name]:
            box = tensor[tuple(slice(o, o + n) for o, n in zip(part.offset, part.extent, strict=True))]
            if part.rank == self._groups.rank:
                box.copy_(self._own[name, part.offset])
            else:
                received = torch.empty(part.extent, dtype=tensor.dtype)
                dist.recv(received, group=self._groups.control, group_src=part.rank)
                box.copy_(received)
        return (tensor,)

    def send(self) -> None:
        """On the other ranks: send this rank's parts, tensor by tensor, in the first rank's order."""
        for name, parts in self._parts.items():
            for part in parts:
                if part.rank == self._groups.rank:
                    dist.send(self._own[name, part.offset].cpu().contiguous(), group=self._groups.control, group_dst=0)


def gather_tensors(exits: Iterable[Exit], groups: Groups) -> Gathered:
    """Determine which rank sends each part, without sending it. The first of several replicas sends."""
    own: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    parts: list[_Part] = []
    for exit_ in exits if groups.data.rank() == 0 else ():
        setup, tensor = exit_.setup, groups.tensor
        for parameter, source in exit_saved_sources(exit_):
            if source.kind == "whole" and tensor.rank() > 0:
                continue
            for block in blocks(parameter, source, setup.architecture, tensor.rank(), tensor.size()):
                dtype = str(block.tensor.dtype).removeprefix("torch.")
                extent = tuple(block.tensor.shape)
                own[block.name, block.offset] = block.tensor
                parts.append(_Part(groups.rank, block.name, block.shape, dtype, block.offset, extent))
    gathered: dict[str, list[_Part]] = {}
    for part in (part for ranks in groups.gather(parts) for part in ranks):
        gathered.setdefault(part.name, []).append(part)
    shapes = {
        name: torch.empty(found[0].shape, dtype=getattr(torch, found[0].dtype), device="meta")
        for name, found in sorted(gathered.items(), key=lambda item: _order(item[0]))
    }
    return Gathered(shapes, {name: gathered[name] for name in shapes}, own, groups)


def _order(name: str) -> tuple[int, str]:
    """Sort key of ``exits.<layer>.<name>``: the layer, independent of the hosting rank."""
    return int(name.split(".")[1]), name
