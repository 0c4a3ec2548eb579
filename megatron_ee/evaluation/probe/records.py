"""What fitted exits, and gates, say of held-out tokens: run over all stages, and gathered on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ee import platform
from megatron_ee.evaluation.probe.forecast import Records
from megatron_ee.evaluation.probe.text import HeldWindows
from megatron_ee.evaluation.quality import FINAL
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.gate import Gate
from megatron_ee.model.metrics import TokenStats
from megatron_ee.progress import track
from megatron_ee.tuning.fit_tokens import Tokens
from megatron_ee.tuning.gates import fit_gates
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.schedule import Microbatch, Pipeline
from megatron_ee.tuning.teacher import TopTokens

GATE_RIDGE = 0.01
Columns = dict[tuple[int, int], NDArray[np.float64]]
"""By window and layer of the exit: ``[values, unmasked tokens]``."""


@dataclass(frozen=True)
class Measured:
    """Exits on held-out tokens.

    Attributes:
        records: of the exits.
        losses: mean loss of each exit.
        final_loss: of the final exit.
    """

    records: Records
    losses: tuple[float, ...]
    final_loss: float


def measure_exits(pipeline: Pipeline, windows: HeldWindows) -> Measured:
    """The exits of all stages on ``windows``; equal on every rank, which all call this."""
    stage, layers = pipeline.stage, [spec.layer for spec in pipeline.specs]

    def at_exit(exit_: Exit, micro: Microbatch) -> Tensor:
        return _stacked(exit_.statistics(micro.taps[exit_.spec.layer], micro.positions, micro.labels))

    def at_end(micro: Microbatch, h: Tensor) -> Tensor:
        return _stacked(stage.final_statistics(h, micro.labels))

    found = _collect(pipeline, windows, at_exit, at_end)
    final_loss, _, final_top1 = _joined(found, windows, FINAL)
    losses, confidence, top1 = np.stack([_joined(found, windows, layer) for layer in layers], axis=1)
    records = Records(tuple(layers), confidence.astype(np.float32), top1 == final_top1, windows.starts())
    return Measured(records, tuple(losses.mean(axis=1).tolist()), float(final_loss.mean()))


def measure_gates(
    pipeline: Pipeline, tokens: Tokens, windows: HeldWindows, layers: Sequence[int], records: Records
) -> Records:
    """Fit gates of the exits after ``layers``; the records of these exits with the gates' probabilities as confidence.

    Every rank calls this.

    Args:
        pipeline: the stages.
        tokens: to fit the gates on.
        windows: that ``records`` are of.
        layers: ascending.
        records: of all exits.
    """
    stage, setup = pipeline.stage, pipeline.stage.setup
    for exit_ in stage.exits:
        if exit_.spec.layer in layers:
            exit_.gate = Gate(setup.architecture.hidden_size).to(platform.device())
    taught = Pipeline(stage, pipeline.layout, pipeline.specs, teacher=TopTokens(1))
    fit_gates(taught, [stage.exits], tokens, 512, Interrupt(), ridges=(GATE_RIDGE,))

    def at_exit(exit_: Exit, micro: Microbatch) -> Tensor | None:
        if exit_.gate is None:
            return None
        z = exit_.features(micro.taps[exit_.spec.layer], micro.positions).flatten(0, 1)
        return exit_.gate(z)[None].double()

    found = _collect(pipeline, windows, at_exit, None)
    chances = np.concatenate([_joined(found, windows, layer) for layer in layers])
    return Records(tuple(layers), chances.astype(np.float32), records.agrees[records.rows(layers)], records.starts)


@torch.no_grad()
def _collect(
    pipeline: Pipeline,
    windows: HeldWindows,
    at_exit: Callable[[Exit, Microbatch], Tensor | None],
    at_end: Callable[[Microbatch, Tensor], Tensor] | None,
) -> Columns:
    """Run ``windows`` through all stages, and gather what the two functions give, ``[values, tokens]`` float64."""
    stage, groups = pipeline.stage, pipeline.stage.setup.groups
    rank, size = groups.data.rank(), groups.data.size()
    found: Columns = {}

    def keep(micro: Microbatch, layer: int, values: Tensor) -> None:
        (window,) = micro.batch.sequences
        found[window, layer] = values[:, micro.mask.bool()].cpu().numpy()

    def take(micro: Microbatch, teacher: object) -> None:
        for exit_ in stage.exits:
            values = at_exit(exit_, micro) if exit_.spec.layer in micro.taps else None
            if values is not None:
                keep(micro, exit_.spec.layer, values)

    def end(micro: Microbatch, h: Tensor) -> None:
        assert at_end is not None
        keep(micro, FINAL, at_end(micro, h))

    with track(len(range(rank, len(windows), size)), "windows", "measuring exits", enabled=groups.is_main) as bar:
        length = pipeline.batches_per_run(1, windows.sequence_length)
        for batches in windows.runs(1, rank, size, length=length):
            pipeline.run(batches, take, None if at_end is None else end)
            bar.advance(len(batches))
    merged: Columns = {}
    for part in groups.gather(found if groups.tensor.rank() == 0 else {}):
        merged |= part
    return merged


def _stacked(stats: TokenStats) -> Tensor:
    """Loss, confidence and top-1 token: ``[3, tokens]`` float64, which holds all of them exactly."""
    return torch.stack((stats.loss.double(), stats.confidence.double(), stats.top1.double()))


def _joined(found: Columns, windows: HeldWindows, layer: int) -> NDArray[np.float64]:
    return np.concatenate([found[window, layer] for window in range(len(windows))], axis=1)
