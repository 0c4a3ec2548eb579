"""Quantised weights of a stage that stay packed in memory, and are expanded when the traversal reaches their layer.

One slot (``model.slots``) holds the expanded weights of the current layer. What is not quantised, such as norms, is
copied into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from megatron_ee.checkpoint.saved_model import SavedModel
from megatron_ee.checkpoint.tensors import READERS
from megatron_ee.config.schema import Weights
from megatron_ee.model.backbone import Backbone
from megatron_ee.model.names import Block, blocks, layer_sources
from megatron_ee.model.packed import PackedMatrix
from megatron_ee.model.setup import ModelSetup
from megatron_ee.model.slots import Event, Slot
from megatron_ee.parallel.tiles import PACKED_SLOTS

SCRATCH = 2**26
"""Maximum number of elements that are expanded at a time, on a device whose tiles have no limit."""


def packed_slots(model: SavedModel, weights: Weights) -> int:
    """Number of slots (``ModelSetup.slots``) for a model whose quantised weights are held as ``weights`` says."""
    return PACKED_SLOTS if weights == "packed" and model.quantised else 0


@dataclass(frozen=True)
class PackedLayer:
    """The weights of a layer on this rank.

    Attributes:
        nbytes: in memory.
        writers: each writes some of the weights into the slot.
    """

    nbytes: int
    writers: Sequence[Callable[[], object]]


def pack_layers(
    backbone: Backbone, model: SavedModel, advance: Callable[[int], None] | None = None
) -> dict[int, PackedLayer]:
    """Read this rank's layers without expanding them, and let the slots be filled from memory.

    Args:
        backbone: its layers share one slot.
        model: with quantised weights.
        advance: called with the number of bytes just read, as if expanded.

    Returns:
        The layers by number.

    Raises:
        CheckpointError: a file cannot be read, or a scale is zero, negative or not finite.
    """
    layers: dict[int, PackedLayer] = {}
    setup, slots = backbone.setup, backbone.slots
    assert slots is not None, "packed layers need a slot"
    (slot,) = slots.slots
    device = slot.memory.device
    with ThreadPoolExecutor(READERS) as pool, torch.no_grad():
        for number, _ in backbone.numbered_layers():
            boxes = _boxes(slot.tensors, number, setup)
            parts = list(pool.map(partial(_read, model=model, setup=setup, device=device), boxes))
            layers[number] = PackedLayer(sum(size for size, _ in parts), [writer for _, writer in parts])
            if advance is not None:
                advance(slot.memory.nbytes)

    def fill(number: int, slot: Slot, event: Event) -> None:
        with torch.no_grad():
            for write in layers[number].writers:
                write()

    slots.fill = fill
    return layers


def _boxes(tensors: Mapping[str, Tensor], number: int, setup: ModelSetup) -> list[Block]:
    """The boxes of released tensors in a layer's parameters; rows of one tensor are joined where possible."""
    arch, tensor = setup.architecture, setup.groups.tensor
    found: list[Block] = []
    for parameter, source in layer_sources(arch, number, tensors):
        named: dict[str, list[Block]] = {}
        for block in blocks(parameter, source, arch, tensor.rank(), tensor.size()):
            named.setdefault(block.name, []).append(block)
        for same in named.values():
            found += _joined(same)
    return found


def _joined(same: Sequence[Block]) -> Iterator[Block]:
    """Blocks of one tensor as one block ``[blocks, rows, columns]``, if they are equal and follow one another.

    Query, key and value of one key-value group are together in their parameter, so the rows of a released tensor are
    at equal distances there.
    """
    first = same[0]
    steps = {after.tensor.storage_offset() - before.tensor.storage_offset() for before, after in pairwise(same)}
    follow = all(
        after.offset[0] - before.offset[0] == len(first.tensor) and after.tensor.shape == first.tensor.shape
        for before, after in pairwise(same)
    )
    if len(same) == 1 or len(steps) > 1 or not follow:
        yield from same
        return
    view = first.tensor.as_strided((len(same), *first.tensor.shape), (*steps, *first.tensor.stride()))
    yield Block(first.name, first.shape, first.offset, view)


def _read(
    block: Block, *, model: SavedModel, setup: ModelSetup, device: torch.device
) -> tuple[int, Callable[[], object]]:
    """Read a box into memory. Returns its number of bytes, and what writes it into the slot."""
    view, quantised = block.tensor, model.quantised.get(block.name)
    if quantised is not None:
        rows = view.shape[:-1].numel()
        packed: PackedMatrix = quantised.pack(block.offset, (rows, view.shape[-1])).to(device)
        elements = min(SCRATCH, setup.tiles.cached_bytes // view.element_size())
        return packed.nbytes, partial(packed.expand, view, elements=elements)
    kept = torch.empty_like(view, memory_format=torch.contiguous_format)
    flat = kept if kept.ndim == len(block.shape) else kept.flatten(0, 1)
    model.weights[block.name].read(flat, block.offset)
    return kept.nbytes, partial(view.copy_, kept)
