"""Filling a stage from a released model: each rank reads its boxes straight into place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ee.checkpoint.digest import backbone_digest
from megatron_ee.checkpoint.hf_directory import HFDirectory
from megatron_ee.checkpoint.names import (
    Block,
    Source,
    backbone_sources,
    blocks,
    exit_copy_sources,
    expected_tensors,
    is_non_weight,
    shared_head_sources,
)
from megatron_ee.checkpoint.safetensors_file import TensorEntry, read_box
from megatron_ee.config.architecture import Architecture, read_architecture
from megatron_ee.errors import CheckpointError
from megatron_ee.model.exits import Exit, initialise_low_rank, initialise_random
from megatron_ee.model.setup import ModelSetup
from megatron_ee.model.stage import Stage

READERS = 2
"""Threads that read at a time: enough to keep a disk busy, few enough buffers to be nothing beside the model."""


@dataclass(frozen=True)
class ReleasedModel:
    """A Hugging Face directory whose tensors have been checked, by their headers, against its ``config.json``.

    Attributes:
        path: the directory.
        architecture: from ``config.json``.
        weights: every weight by released name.
    """

    path: Path
    architecture: Architecture
    weights: dict[str, TensorEntry]

    def digest(self, *, fresh: bool = False, advance: Callable[[int], None] | None = None) -> str:
        """The backbone's hash; see ``backbone_digest``."""
        return backbone_digest(self.weights, fresh=fresh, advance=advance)


def open_released(path: str | Path) -> ReleasedModel:
    """Check a released model before any memory is spent on it.

    Raises:
        CheckpointError: the directory, ``config.json`` or a file is not usable, a weight is missing, unknown, of
            another shape, or not of a floating dtype.
    """
    architecture = read_architecture(path)
    directory = HFDirectory.open(path)
    expected = expected_tensors(architecture)
    for name in directory.tensors:
        if name not in expected and not is_non_weight(name, architecture):
            raise CheckpointError(
                f"{directory.tensors[name].path}: unknown tensor {name!r} for a {architecture.family} model"
            )
    for name, shape in expected.items():
        entry = directory.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{directory.path}: tensor {name!r} is missing from {_listed(directory.files)}")
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.path}: tensor {name!r} has shape {list(entry.shape)}, but config.json makes it {list(shape)}"
            )
        if not entry.dtype.is_floating_point:
            raise CheckpointError(f"{entry.path}: tensor {name!r} has dtype {entry.dtype}; expected a floating one")
    return ReleasedModel(directory.path, architecture, {name: directory.tensors[name] for name in expected})


def _listed(files: Iterable[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_backbone(stage: Stage, model: ReleasedModel, advance: Callable[[int], None] | None = None) -> None:
    """Read the backbone's part of ``stage``, and its shared head, from a released model.

    Args:
        stage: allocated, its values undefined.
        model: checked.
        advance: called with the number of bytes just read, as they are stored here.

    Raises:
        CheckpointError: a file cannot be read.
    """
    fill(itertools.chain(backbone_sources(stage.backbone), shared_head_sources(stage)), model, stage.setup, advance)


def initialise_exit(exit_: Exit, model: ReleasedModel, seed: int) -> None:
    """Give a new exit its first values: copied from the model's own weights, or random (design: exits).

    Raises:
        CheckpointError: a file cannot be read.
    """
    copied: Iterator[tuple[Tensor, Source]] = exit_copy_sources(exit_)
    if exit_.spec.init == "random":
        initialise_random(exit_, seed)
        copied = (pair for pair in copied if not pair[0].requires_grad)
    fill(copied, model, exit_.setup)
    initialise_low_rank(exit_, seed)


def load_frozen_norms(exit_: Exit, model: ReleasedModel) -> None:
    """Read what an exit holds frozen: the norm that an ``mlp`` exit reads its tap through."""
    fill((pair for pair in exit_copy_sources(exit_) if not pair[0].requires_grad), model, exit_.setup)


def fill(
    parameters: Iterable[tuple[Tensor, Source]],
    model: ReleasedModel,
    setup: ModelSetup,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Read this rank's blocks of each parameter; rows that pad the vocabulary become zero."""
    tensor = setup.groups.tensor
    wanted: list[Block] = []
    for parameter, source in parameters:
        if source.kind == "vocabulary":
            parameter.detach()[max(0, setup.architecture.vocab_size - tensor.rank() * len(parameter)) :].zero_()
        wanted += blocks(parameter, source, setup.architecture, tensor.rank(), tensor.size())

    def read(block: Block) -> int:
        read_box(model.weights[block.name], block.tensor, block.offset)
        return block.tensor.numel() * block.tensor.element_size()

    with ThreadPoolExecutor(READERS) as pool, torch.no_grad():
        for count in pool.map(read, wanted):
            if advance is not None:
                advance(count)
