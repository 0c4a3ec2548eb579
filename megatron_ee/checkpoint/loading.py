"""Filling a stage from a saved model: each rank reads its boxes straight into place."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.checkpoint.digest import backbone_digest
from megatron_ee.checkpoint.hf_directory import INDEX, HFDirectory
from megatron_ee.checkpoint.manifest import MANIFEST
from megatron_ee.checkpoint.parallel import EXITS, check_parallel
from megatron_ee.checkpoint.store import Checkpoint, open_checkpoint
from megatron_ee.checkpoint.tensors import StoredTensor, same_values, stored
from megatron_ee.config.architecture import Architecture
from megatron_ee.errors import CheckpointError, ConfigError, shown
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.stage import Stage
from megatron_ee.exits.tensors import exit_copy_sources, shared_head_sources
from megatron_ee.families.family import Source
from megatron_ee.families.registry import read_architecture
from megatron_ee.families.weights import EMBEDDING, LM_HEAD, expected_tensors, is_non_weight
from megatron_ee.model.names import Block, backbone_sources, blocks
from megatron_ee.model.setup import ModelSetup
from megatron_ee.parallel.groups import launched_rank

READERS = 2
"""Threads that read at a time: enough to keep a disk busy, few enough buffers to be nothing beside the model."""


@dataclass(frozen=True)
class SavedModel:
    """A Hugging Face directory or a parallel checkpoint, its tensors checked against its ``config.json``.

    Attributes:
        path: the directory.
        architecture: from ``config.json``; ``tied`` is what the tensors say.
        weights: every weight by released name.
        non_weights: known tensors beside them that hold no weight of their own.
        checkpoint: the parallel checkpoint; None for a Hugging Face directory.
    """

    path: Path
    architecture: Architecture
    weights: dict[str, StoredTensor]
    non_weights: dict[str, StoredTensor] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None

    @property
    def dtype(self) -> str:
        """The dtype that most of its weights are stored in, of those that models run in: bfloat16 for float16."""
        stored: Counter[torch.dtype] = Counter()
        for tensor in self.weights.values():
            stored[tensor.dtype] += tensor.nbytes
        return "float32" if stored.most_common(1)[0][0] in (torch.float32, torch.float64) else "bfloat16"

    def digest(self, *, fresh: bool = False, advance: Callable[[int], None] | None = None) -> str:
        """The backbone's hash; see ``backbone_digest``."""
        return backbone_digest(self.weights, fresh=fresh, advance=advance)


def choose_dtype(asked: str, model: SavedModel, key: str, *, tuning: bool = False) -> str:
    """The dtype to run ``model`` in: what is asked for, or with ``auto`` its own.

    Where it is slow on this CPU the first rank says so on stderr, in one line that begins with ``key``.

    Raises:
        ConfigError: it is unknown; names ``key``.
    """
    if asked not in ("auto", *platform.DTYPES):
        raise ConfigError(f"{key}: {shown(asked)} is unknown; possible: auto, {', '.join(platform.DTYPES)}")
    dtype = model.dtype if asked == "auto" else asked
    if platform.is_slow(dtype) and launched_rank() == 0:
        speed = "several times as fast for tuning" if tuning else "faster"
        line = f"{key}: {dtype} is slow on this CPU; float32 is {speed} and takes twice the memory"
        print(line, file=sys.stderr, flush=True)
    return dtype


def open_model(path: str | Path, *, verify: bool = True) -> SavedModel:
    """Check a model before any memory is spent on it.

    Args:
        path: a Hugging Face directory or a parallel checkpoint.
        verify: check what is read of a parallel checkpoint; Hugging Face directories hold nothing to check against.

    Raises:
        CheckpointError: the directory, ``config.json`` or a file is not usable, a weight is missing, unknown, of
            another shape, or not of a floating dtype.
    """
    path = Path(path)
    if os.path.isfile(path / MANIFEST):
        return model_in(open_checkpoint(path, verify=verify))
    architecture, directory = read_architecture(path), HFDirectory.open(path)
    tensors = {name: stored(entry) for name, entry in directory.tensors.items()}
    return _checked(path, architecture, tensors, directory.absent)


def model_in(checkpoint: Checkpoint) -> SavedModel:
    """The backbone in an open parallel checkpoint.

    Raises:
        CheckpointError: as ``open_model``.
    """
    check_parallel(checkpoint)
    tensors = {key: tensor for key, tensor in checkpoint.tensors().items() if not key.startswith(EXITS)}
    model = _checked(checkpoint.path, read_architecture(checkpoint.path), tensors, {})
    return dataclasses.replace(model, checkpoint=checkpoint)


def _checked(
    path: Path, architecture: Architecture, tensors: dict[str, StoredTensor], absent: Mapping[str, Path]
) -> SavedModel:
    """The model of these tensors, compared with what its architecture needs; ``absent`` as in ``HFDirectory``."""
    architecture, tensors = _resolve_head(architecture, tensors)
    expected = expected_tensors(architecture)
    for name, file in absent.items():
        if name not in tensors and not is_non_weight(name, architecture):
            raise CheckpointError(f"{file}: tensor {name!r} is missing, which {INDEX} places there")
    for name, tensor in tensors.items():
        if name not in expected and not is_non_weight(name, architecture):
            raise CheckpointError(f"{tensor.files[-1]}: unknown tensor {name!r} for a {architecture.family} model")
    for name, shape in expected.items():
        if name not in tensors:
            files = sorted({file for tensor in tensors.values() for file in tensor.files})
            raise CheckpointError(f"{path}: tensor {name!r} is missing from {_listed(files)}")
        where = f"{tensors[name].files[-1]}: tensor {name!r}"
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{where} has shape {list(tensors[name].shape)}, but config.json makes it {list(shape)}"
            )
        if not tensors[name].dtype.is_floating_point:
            raise CheckpointError(f"{where} has dtype {tensors[name].dtype}; expected a floating one")
    others = {name: tensor for name, tensor in tensors.items() if name not in expected}
    return SavedModel(path, architecture, {name: tensors[name] for name in expected}, others)


def _resolve_head(
    architecture: Architecture, tensors: dict[str, StoredTensor]
) -> tuple[Architecture, dict[str, StoredTensor]]:
    """Whether the head is tied, by the tensors rather than ``config.json``, and the tensors; as transformers ties them.

    A head that differs from the input embedding is kept: the model was tuned so. Where there is a head alone, it is
    the embedding too.
    """
    if not architecture.tied or LM_HEAD not in tensors:
        return architecture, tensors
    if EMBEDDING not in tensors:
        return architecture, {EMBEDDING if name == LM_HEAD else name: tensor for name, tensor in tensors.items()}
    return dataclasses.replace(architecture, tied=_is_tied(tensors[EMBEDDING], tensors[LM_HEAD])), tensors


def _is_tied(embedding: StoredTensor, head: StoredTensor) -> bool:
    """Whether a head repeats the embedding. They are large, so their hashes are kept and they are read once."""
    if (embedding.dtype, embedding.shape) != (head.dtype, head.shape):
        return same_values(embedding, head)
    # Hashed under one name, but remembered as another tensor of the same files.
    named = dataclasses.replace(head, made=f"{LM_HEAD} {head.made}")
    return backbone_digest({EMBEDDING: embedding}) == backbone_digest({EMBEDDING: named})


def _listed(files: Iterable[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_backbone(stage: Stage, model: SavedModel, advance: Callable[[int], None] | None = None) -> None:
    """Read the backbone's part of ``stage``, and its shared head, from a saved model.

    Args:
        stage: allocated, its values undefined.
        model: checked.
        advance: called with the number of bytes just read, as they are stored here.

    Raises:
        CheckpointError: a file cannot be read.
    """
    fill(itertools.chain(backbone_sources(stage.backbone), shared_head_sources(stage)), model, stage.setup, advance)


def load_frozen_norms(exit_: Exit, model: SavedModel) -> None:
    """Read what an exit holds frozen: the norm that an ``mlp`` exit reads its tap through."""
    fill((pair for pair in exit_copy_sources(exit_) if not pair[0].requires_grad), model, exit_.setup)


def fill(
    parameters: Iterable[tuple[Tensor, Source]],
    model: SavedModel,
    setup: ModelSetup,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Read this rank's blocks of each parameter; rows that pad the vocabulary become zero."""
    tensor = setup.groups.tensor
    wanted: dict[str, list[Block]] = {}
    for parameter, source in parameters:
        if source.kind == "vocabulary":
            parameter.detach()[max(0, setup.architecture.vocab_size - tensor.rank() * len(parameter)) :].zero_()
        for block in blocks(parameter, source, setup.architecture, tensor.rank(), tensor.size()):
            wanted.setdefault(block.name, []).append(block)

    def read(name: str) -> int:
        """One thread reads all that is wanted of a tensor: boxes that follow each other may share a checked block."""
        for block in wanted[name]:
            model.weights[name].read(block.tensor, block.offset)
        return sum(block.tensor.numel() * block.tensor.element_size() for block in wanted[name])

    with ThreadPoolExecutor(READERS) as pool, torch.no_grad():
        for count in pool.map(read, wanted):
            if advance is not None:
                advance(count)
