"""Exits spread over ranks, put together tensor by tensor on the first rank; no rank ever holds two whole ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee.exits.exit import Exit
from megatron_ee.exits.tensors import exit_saved_sources
from megatron_ee.model.names import blocks
from megatron_ee.parallel.groups import Groups


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
    """Every trained tensor in its released name and shape.

    Attributes:
        shapes: tensors without content, on the meta device, in the order in which ``whole`` must be asked for them.
    """

    shapes: dict[str, Tensor]
    _parts: dict[str, list[_Part]]
    _own: dict[tuple[str, tuple[int, ...]], Tensor]
    _groups: Groups

    def whole(self, name: str) -> tuple[Tensor]:
        """On the first rank: the content of the next tensor, on the host, as the others send theirs."""
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
        """On the others: give what this rank has, tensor by tensor, as the first one asks."""
        for name, parts in self._parts.items():
            for part in parts:
                if part.rank == self._groups.rank:
                    dist.send(self._own[name, part.offset].cpu().contiguous(), group=self._groups.control, group_dst=0)


def gather_tensors(exits: Iterable[Exit], groups: Groups) -> Gathered:
    """Agree on who has which part; nothing is sent yet. Replicas have the same, so the first one gives."""
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
    """``exits.<layer>.<name>``: by layer, whatever rank hosts it."""
    return int(name.split(".")[1]), name
