"""Loads a stage from a saved model and an adapter. Each rank reads its boxes directly into its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_ee.checkpoint.adapter import Adapter, check_same_kind, named_tensor
from megatron_ee.checkpoint.packing import pack_layers
from megatron_ee.checkpoint.saved_model import SavedModel
from megatron_ee.checkpoint.tensors import READERS
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.stage import Stage
from megatron_ee.exits.tensors import exit_copy_sources, gate_sources, shared_head_sources, trained_parts
from megatron_ee.families.family import Source
from megatron_ee.model.names import Block, backbone_sources, blocks, layer_sources
from megatron_ee.model.setup import ModelSetup
from megatron_ee.model.streaming import stream_from_files, stream_from_host
from megatron_ee.progress import track


def fill_stage(stage: Stage, model: SavedModel, adapter: Adapter | None) -> None:
    """Load the layers and exits of a stage, with a progress bar on the first rank.

    Raises:
        CheckpointError: a file cannot be read, or lacks a tensor that the stage needs.
    """
    with track(backbone_bytes(stage), "B", "loading", enabled=stage.setup.groups.is_main) as bar:
        load_backbone(stage, model, bar.advance)
    if adapter is not None:
        load_exits(stage.exits, adapter, model)


def load_backbone(stage: Stage, model: SavedModel, advance: Callable[[int], None] | None = None) -> None:
    """Read the backbone of ``stage``, and the stage's shared head, from a saved model.

    Layers with slots are read when they are reached, unless they are kept in host memory, or quantised and packed.

    Args:
        stage: allocated, with undefined values.
        model: the checked model.
        advance: called with the number of bytes just read, in the stage's dtype.

    Raises:
        CheckpointError: a file cannot be read.
    """
    setup, slots = stage.setup, stage.backbone.slots
    fill(_loaded(stage), model, setup, advance)
    if slots is None:
        return

    def read(number: int, tensors: Mapping[str, Tensor]) -> None:
        fill(layer_sources(model.architecture, number, tensors), model, setup)

    if setup.residency == "disk":
        stream_from_files(slots, read)
    elif setup.residency == "host":
        stream_from_host(slots, read, advance)
    elif model.quantised:
        pack_layers(stage.backbone, model, advance)
    else:
        slots.fill = lambda number, slot, event: read(number, slot.tensors)


def backbone_bytes(stage: Stage) -> int:
    """Number of bytes that ``load_backbone`` reads, in the stage's dtype."""
    slots, nbytes = stage.backbone.slots, sum(parameter.nbytes for parameter, _ in _loaded(stage))
    if slots is None or stage.setup.residency == "disk":
        return nbytes
    return nbytes + len(slots.numbers) * slots.slots[0].memory.nbytes


def _loaded(stage: Stage) -> Iterator[tuple[Tensor, Source]]:
    """The parameters that ``load_backbone`` fills."""
    return itertools.chain(backbone_sources(stage.backbone), shared_head_sources(stage))


def load_frozen_norms(exit_: Exit, model: SavedModel) -> None:
    """Read an exit's frozen tensors: the norms that it applies to its tap."""
    fill((pair for pair in exit_copy_sources(exit_) if not pair[0].requires_grad), model, exit_.setup)


def load_exits(exits: Iterable[Exit], adapter: Adapter, model: SavedModel) -> None:
    """Fill exits from an adapter, and their frozen tensors from the model.

    A gate that the adapter lacks keeps its values.

    Raises:
        CheckpointError: the adapter lacks an exit or has another kind of it, or a tensor is missing or has another
            shape.
    """
    known = {spec.layer: spec for spec in adapter.exits}
    with torch.no_grad():
        for exit_ in exits:
            check_same_kind(exit_.spec, known.get(exit_.spec.layer), adapter)
            load_frozen_norms(exit_, model)
            for parameter, part in trained_parts(exit_):
                if part.optional and part.copied is not None and part.saved.names[0] not in adapter.weights:
                    fill([(parameter, part.copied)], model, exit_.setup)
                else:
                    _read(parameter, part.saved, exit_, adapter)
            if known[exit_.spec.layer].gate:
                for parameter, source in gate_sources(exit_):
                    _read(parameter, source, exit_, adapter)


def fill(
    parameters: Iterable[tuple[Tensor, Source]],
    model: SavedModel,
    setup: ModelSetup,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Read this rank's blocks of each parameter. Padding rows of the vocabulary become zero."""
    tensor = setup.groups.tensor
    wanted: dict[str, list[Block]] = {}
    for parameter, source in parameters:
        if source.kind == "vocabulary":
            parameter.detach()[max(0, setup.architecture.vocab_size - tensor.rank() * len(parameter)) :].zero_()
        for block in blocks(parameter, source, setup.architecture, tensor.rank(), tensor.size()):
            wanted.setdefault(block.name, []).append(block)

    def read(name: str) -> int:
        """Read all boxes of a tensor, in one thread because adjacent boxes may share a verified block."""
        for block in wanted[name]:
            model.weights[name].read(block.tensor, block.offset)
        return sum(block.tensor.numel() * block.tensor.element_size() for block in wanted[name])

    with ThreadPoolExecutor(READERS) as pool, torch.no_grad():
        for count in pool.map(read, wanted):
            if advance is not None:
                advance(count)


def _read(parameter: Tensor, source: Source, exit_: Exit, adapter: Adapter) -> None:
    setup = exit_.setup
    if source.kind == "vocabulary":
        parameter.zero_()
    for block in blocks(parameter, source, setup.architecture, setup.groups.tensor.rank(), setup.groups.tensor.size()):
        named_tensor(adapter, block.name, block.shape).read(block.tensor, block.offset)
