"""The training checkpoint: exits, optimizer, schedule and data position, enough to continue bit for bit.

It is in the native format (``checkpoint.manifest``), under global keys: an exit's tensor by its adapter name, optimizer
state as ``optimizer.<kind>.<adapter name>`` with the shape of its weights. Each rank writes the elements that it
updates, as boxes of these tensors, so that a checkpoint loads in any other layout. The initial values that weight decay
may go towards are optimizer state too, so a resumed run does not depend on what the exits were initialised from. Gates
that were fitted after the same step are there too. The backbone is named by path and hash, not copied. No random state
is needed: the backbone has no dropout, the data order depends on seed and position only, and random exit initialisation
happens before the first step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from megatron_ee.checkpoint.adapter import SETTINGS
from megatron_ee.checkpoint.atomic import prune
from megatron_ee.checkpoint.saving import Saver, group_saver
from megatron_ee.checkpoint.store import Checkpoint
from megatron_ee.checkpoint.writing import Piece
from megatron_ee.config.architecture import changed_settings
from megatron_ee.config.validation import Strict, validated
from megatron_ee.data.checks import changed_data
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.exits.stage import Stage
from megatron_ee.exits.tensors import gate_sources, trained_parts
from megatron_ee.families.family import Source
from megatron_ee.model.names import blocks
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.parallel.split_adam import join, remainder_of

OPTIMIZER = "optimizer."
Count = Annotated[int, Field(ge=0)]


class RunProgress(Strict, frozen=False):
    """Progress of a run.

    Attributes:
        step: steps completed.
        consumed: sequences read from the blend.
        tokens: unmasked tokens so far.
        best_loss: lowest weighted validation loss so far; None before the first.
        best_step: the step of ``best_loss``.
        skipped: number of steps in a row, up to the last one, that updated nothing.
        validation_due: a signal ended the validation after this step, so a resumed run validates first.
        stale_validations: number of validations in a row, up to the last one, without a new lowest loss.
        gates_step: the step after which the gates were last fitted; None before the first time, and without gates. A
            checkpoint holds them if this is its own step. After a signal it need not be.
    """

    step: Count = 0
    consumed: Count = 0
    tokens: Count = 0
    best_loss: float | None = None
    best_step: Count | None = None
    skipped: Count = 0
    validation_due: bool = False
    stale_validations: Count = 0
    gates_step: Count | None = None

    def stopped_early(self, patience: int) -> bool:
        """Whether the validation loss has not improved for ``tuning.patience`` validations; 0 waits for ever."""
        return 0 < patience <= self.stale_validations


class _Counters(Strict, extra="ignore"):
    adam_step: Count
    scheduler: Count


class _Metadata(Strict, extra="ignore"):
    """The part of a checkpoint's metadata that holds the run's progress."""

    progress: RunProgress
    counters: _Counters


def save_state(
    checkpoints: Path,
    stage: Stage,
    optimizer: ExitOptimizer,
    progress: RunProgress,
    description: dict[str, Any],
    keep: int,
    saver: Saver | None = None,
    *,
    then: Callable[[Path], None] = lambda path: None,
    wait: bool = False,
) -> Path:
    """Write ``step-N`` and delete the oldest beyond ``keep``. Every rank calls this.

    Args:
        description: identification of the run: backbone path and hash, configuration, exits.
        saver: writes in the background; None writes in this thread.
        then: called by the first rank with the checkpoint when it is on disk.
        wait: return only when it is on disk.

    Raises:
        CheckpointError: this checkpoint, or an earlier one of ``saver``, cannot be written. No incomplete checkpoint
            stays.
    """
    groups, path = stage.setup.groups, checkpoints / f"step-{progress.step}"
    saver = saver or group_saver(groups, asynchronous=False)
    # The first rank may train nothing; its Adam has then counted no steps.
    counters = groups.gather(optimizer.counters())
    metadata = {
        **description,
        "progress": progress.model_dump(),
        "counters": {name: max(each[name] for each in counters) for name in counters[0]},
    }
    pieces = _own_pieces(stage, optimizer)
    if progress.gates_step == progress.step:
        pieces = itertools.chain(pieces, _own_gates(stage))
    elif "exits" in metadata:
        metadata["exits"] = [{**each, "gate": False} for each in metadata["exits"]]

    def finish() -> None:
        prune(checkpoints, keep)
        then(path)

    saver.save(path, pieces, metadata, finish, wait=wait)
    return path


def saved_step(path: Path) -> int:
    """The step of a checkpoint that ``save_state`` wrote."""
    return int(path.name.removeprefix("step-"))


def check_same_run(checkpoint: Checkpoint, description: dict[str, Any]) -> None:
    """Refuse a checkpoint of another backbone, quantisation, dtype, exits or data, from its metadata alone.

    Args:
        description: as in ``save_state``. Missing keys are not compared.

    Raises:
        CheckpointError: the runs differ; the message names what differs.
        ConfigError: a corpus has other content, or ``optimizer.decay_towards`` needs initial values that the checkpoint
            does not hold; the message names the key.
    """
    recorded, found = checkpoint.metadata.get(SETTINGS), description.get(SETTINGS)
    if isinstance(recorded, dict) and found is not None and (changed := changed_settings(recorded, found)):
        raise CheckpointError(
            f"{checkpoint.path}: made with other settings of the model: {changed}; restore its config.json, or start "
            "a new run"
        )
    kinds = {
        "exits": "other exits",
        "dtype": "another dtype",
        "quantise": "another model.quantise",
        "backbone_sha256": "another backbone",
    }
    for key, kind in kinds.items():
        if key in description and _compared(checkpoint.metadata.get(key)) != _compared(description[key]):
            raise CheckpointError(
                f"{checkpoint.path}: made with {kind}; resume with the configuration it was started with, "
                f"or start a new run with --init-adapter"
            )
    if _decay_towards(description) == "initial" and _decay_towards(checkpoint.metadata) == "zero":
        raise ConfigError(
            f"optimizer.decay_towards: initial, but {checkpoint.path} does not hold the exits' initial values; resume "
            "with zero, or start a new run"
        )
    if "data" in description and (changes := changed_data(checkpoint.metadata.get("data"), description["data"])):
        named = "; ".join(f"{key}: {change}" for key, change in changes.items())
        raise ConfigError(f"{named}; restore the data, or use the new one with --allow-new-data")


def _decay_towards(description: Mapping[str, Any]) -> str:
    """``optimizer.decay_towards`` of a run; releases without that key decayed towards zero."""
    found: Any = description
    for key in ("config", "optimizer", "decay_towards"):
        found = found.get(key) if isinstance(found, dict) else None
    return str(found or "zero")


def _compared(value: Any) -> Any:
    """What must be equal of an entry: of exits all but ``init`` and ``gate``, which have no effect on later steps."""
    if not isinstance(value, list):
        return value
    return [
        {k: v for k, v in each.items() if k not in ("init", "gate")} if isinstance(each, dict) else each
        for each in value
    ]


def load_state(
    checkpoint: Checkpoint, stage: Stage, optimizer: ExitOptimizer, description: dict[str, Any]
) -> RunProgress:
    """Load a checkpoint, made in any layout, into ``stage`` and ``optimizer``.

    If it does not hold the gates of this run's exits, they keep their values and ``gates_step`` is None.

    Raises:
        CheckpointError: it is damaged, or of another backbone, dtype or exits (see ``check_same_run``).
    """
    check_same_run(checkpoint, description)
    progress, counters = _read_progress(checkpoint)
    if progress.gates_step != progress.step or _gated(checkpoint.metadata) != _gated(description):
        progress.gates_step = None
    gates = _gate_pieces(stage) if progress.gates_step is not None else ()
    pieces = [*_state_pieces(stage, optimizer), *_weight_pieces(stage, None), *gates]
    with torch.no_grad():
        for piece in pieces:
            kind, _, name = piece.key.removeprefix(OPTIMIZER).partition(".")
            if piece.key.startswith(OPTIMIZER) and piece.key not in checkpoint and kind in ("main", "remainder"):
                _read_converted(checkpoint, kind, name, piece)
            else:
                _read(checkpoint, piece.key, piece, piece.tensor)
    optimizer.restore_counters(counters)
    return progress


def _gated(description: Mapping[str, Any]) -> list[bool]:
    """Which exits have a gate, of a description that ``check_same_run`` has accepted."""
    return [bool(each.get("gate")) for each in description.get("exits", ())]


def _read(checkpoint: Checkpoint, key: str, piece: Piece, out: Tensor) -> Tensor:
    """Read the box of ``piece`` from tensor ``key``, which must have the shape of the piece's tensor."""
    if checkpoint.shape(key) != tuple(piece.global_shape):
        found, expected = list(checkpoint.shape(key)), list(piece.global_shape)
        raise CheckpointError(f"{checkpoint.path}: tensor {key!r} has shape {found}, expected {expected}")
    return checkpoint.read(key, out, tuple(piece.offset))


def _read_converted(checkpoint: Checkpoint, kind: str, name: str, piece: Piece) -> None:
    """Read and convert main weights that another implementation of Adam saved in the other form."""
    like = piece.tensor
    weight = _read(checkpoint, name, piece, torch.empty_like(like, dtype=torch.bfloat16))
    if kind == "remainder":
        main = _read(checkpoint, f"{OPTIMIZER}main.{name}", piece, torch.empty_like(like, dtype=torch.float32))
        like.copy_(remainder_of(main, weight))
    else:
        stored = _read(checkpoint, f"{OPTIMIZER}remainder.{name}", piece, torch.empty_like(like, dtype=torch.int16))
        like.copy_(join(weight, stored))


def _read_progress(checkpoint: Checkpoint) -> tuple[RunProgress, dict[str, int]]:
    """The run's progress, and the optimizer's counters."""
    metadata = validated(_Metadata, checkpoint.metadata, where=str(checkpoint.path), error=CheckpointError)
    return metadata.progress, metadata.counters.model_dump()


def _own_pieces(stage: Stage, optimizer: ExitOptimizer) -> Iterator[Piece]:
    """The pieces that this rank updates, and therefore writes.

    The first tensor-parallel rank writes the tensors that all of them hold whole.
    """
    ranges = {id(state.parameter): (state.start, state.stop) for state in optimizer.parameter_states()}
    first = stage.setup.groups.tensor.rank() == 0
    yield from _state_pieces(stage, optimizer, skip_whole=not first)
    yield from _weight_pieces(stage, ranges, skip_whole=not first)


def _own_gates(stage: Stage) -> Iterator[Piece]:
    """The gates that this rank writes: the first tensor- and data-parallel rank of a stage, since all hold the same."""
    groups = stage.setup.groups
    if groups.tensor.rank() == groups.data.rank() == 0:
        yield from _gate_pieces(stage)


def _gate_pieces(stage: Stage) -> Iterator[Piece]:
    for exit_ in stage.exits:
        for parameter, source in gate_sources(exit_):
            flat = parameter.detach()
            yield from _pieces(stage, parameter, source, "", flat, 0, flat.numel())


def _state_pieces(stage: Stage, optimizer: ExitOptimizer, *, skip_whole: bool = False) -> Iterator[Piece]:
    states = {id(state.parameter): state for state in optimizer.parameter_states()}
    for parameter, source in _saved(stage, skip_whole):
        state = states.get(id(parameter))
        if state is not None:
            for kind, flat in state.tensors.items():
                prefix = f"{OPTIMIZER}{kind}."
                yield from _pieces(stage, parameter, source, prefix, flat, state.start, state.stop)


def _weight_pieces(
    stage: Stage, ranges: dict[int, tuple[int, int]] | None, *, skip_whole: bool = False
) -> Iterator[Piece]:
    """Elements ``ranges`` of the weights, by parameter; all elements if ``ranges`` is None."""
    for parameter, source in _saved(stage, skip_whole):
        whole = (0, parameter.numel())
        start, stop = whole if ranges is None else ranges.get(id(parameter), (0, 0))
        yield from _pieces(stage, parameter, source, "", parameter.detach().view(-1)[start:stop], start, stop)


def _saved(stage: Stage, skip_whole: bool) -> Iterator[tuple[Tensor, Source]]:
    for exit_ in stage.exits:
        for parameter, part in trained_parts(exit_):
            if not (skip_whole and part.saved.kind == "whole"):
                yield parameter, part.saved


def _pieces(
    stage: Stage, parameter: Tensor, source: Source, prefix: str, flat: Tensor, start: int, stop: int
) -> Iterator[Piece]:
    """Boxes of released tensors in ``flat``, which belongs to elements ``start:stop`` of the flattened parameter."""
    setup, origin = stage.setup, parameter.storage_offset()
    for block in blocks(parameter, source, setup.architecture, setup.groups.tensor.rank(), setup.groups.tensor.size()):
        begin = int(block.tensor.storage_offset()) - int(origin)  # a block is contiguous in the parameter's memory
        first, last = max(start, begin), min(stop, begin + block.tensor.numel())
        for offset, shape in run_boxes(block.tensor.shape, first - begin, last - begin):
            count = math.prod(shape)
            where = [base + inner for base, inner in zip(block.offset, offset, strict=True)]
            yield Piece(prefix + block.name, block.shape, where, flat[first - start :][:count].view(shape))
            first += count


def run_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offset and shape of the boxes that cover elements ``start:stop`` of a row-major tensor (1 or 2 dimensions).

    There are at most three: the rest of a row, whole rows, and the start of a row.
    """
    if len(shape) == 1:
        if start < stop:
            yield (start,), (stop - start,)
        return
    columns = shape[1]
    while start < stop:
        row, column = divmod(start, columns)
        rows = (stop - start) // columns if column == 0 else 0
        box = (max(1, rows), columns if rows else min(columns - column, stop - start))
        yield (row, column), box
        start += math.prod(box)
