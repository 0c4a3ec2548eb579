"""The training checkpoint: exits, optimizer, schedule and data position, enough to go on bit for bit.

It is in the native format (``checkpoint.store``), under global keys: an exit's tensor by its adapter name, optimizer
state as ``optimizer.<kind>.<adapter name>`` with the shape and offset of the weights it belongs to. The backbone is
named by path and hash, not copied. No random state is needed: the backbone has no dropout, the data order is a
function of seed and position, and random exit initialisation is over before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ee.checkpoint.atomic import prune
from megatron_ee.checkpoint.names import Block, blocks, exit_saved_sources
from megatron_ee.checkpoint.store import Checkpoint, Piece, write_checkpoint
from megatron_ee.errors import CheckpointError
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.optimizer import ExitOptimizer


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done.
        consumed: sequences taken from the blend.
        tokens: tokens that counted in the loss.
        best_loss: lowest weighted validation loss so far; None before the first.
        best_step: the step it was reached at.
    """

    step: int = 0
    consumed: int = 0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None


def save_state(
    checkpoints: Path,
    stage: Stage,
    optimizer: ExitOptimizer,
    progress: Progress,
    description: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``step-N`` and delete the oldest beyond ``keep``.

    Args:
        description: what identifies the run: backbone path and hash, configuration, exits.

    Raises:
        CheckpointError: it cannot be written; nothing half-written stays.
    """
    path = checkpoints / f"step-{progress.step}"
    pieces = [Piece(key, b.shape, b.offset, b.tensor) for key, b in _state_blocks(stage, optimizer)]
    metadata = {**description, "progress": asdict(progress), "counters": optimizer.counters()}
    write_checkpoint(path, pieces, metadata)
    prune(checkpoints, keep)
    return path


def load_state(checkpoint: Checkpoint, stage: Stage, optimizer: ExitOptimizer, description: dict[str, Any]) -> Progress:
    """Put a checkpoint's content in place.

    Raises:
        CheckpointError: it is damaged, or of another backbone or other exits.
    """
    for key in ("backbone_sha256", "exits", "dtype"):
        if checkpoint.metadata.get(key) != description[key]:
            raise CheckpointError(
                f"{checkpoint.path}: made with another {key}; resume with the configuration it was started with, "
                f"or start anew with --init-adapter"
            )
    with torch.no_grad():
        for key, block in _state_blocks(stage, optimizer):
            checkpoint.read(key, block.tensor, block.offset)
    optimizer.restore_counters(checkpoint.metadata["counters"])
    return Progress(**checkpoint.metadata["progress"])


def _state_blocks(stage: Stage, optimizer: ExitOptimizer) -> Iterator[tuple[str, Block]]:
    """Key and box of every tensor, weights last: making Adam's first state moves them."""
    states = {id(state.parameter): state for state in optimizer.parameter_states()}
    setup = stage.setup
    rank, size = setup.groups.tensor.rank(), setup.groups.tensor.size()
    for exit_ in stage.exits:
        for parameter, source in exit_saved_sources(exit_):
            state = states[id(parameter)]
            assert (state.start, state.stop) == (0, parameter.numel()), "this rank updates the whole parameter"
            tensors: dict[str, Tensor] = {f"optimizer.{kind}.": flat for kind, flat in state.tensors.items()}
            for prefix, flat in {**tensors, "": parameter.detach().view(-1)}.items():
                for block in blocks(flat.view(parameter.shape), source, setup.architecture, rank, size):
                    yield prefix + block.name, block
