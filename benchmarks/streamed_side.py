"""The side of the benchmark of streamed layers: the tuning step with layers of any residency, and its timeline."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.limits import seconds
from megatron_ee import platform
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import SavedModel, open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import LossConfig, OptimizerConfig, Residency, ScheduleConfig
from megatron_ee.data.loader import Batch
from megatron_ee.evaluation.timeline import plot_timeline
from megatron_ee.exits.stage import Stage
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.parallel.tiles import STREAMED_SLOTS
from megatron_ee.planning.memory import stage_memory
from megatron_ee.planning.workload import Workload
from megatron_ee.tuning.schedule import Pipeline, Span, one_stage
from megatron_ee.tuning.step import StepResult, tuning_step

SEED = 1234
STEPS = 1_000_000  # of the learning rate's schedule: never reached


class StreamedSide:
    """Runs one step at a time on the same batches."""

    def __init__(
        self,
        pipeline: Pipeline,
        optimizer: ExitOptimizer,
        batches: list[Batch],
        model: SavedModel,
        before: int,
        cold: bool,
        plot: str | None,
    ) -> None:
        """
        Args:
            pipeline: the stage.
            optimizer: of its exits.
            batches: of a step.
            model: the files.
            before: bytes of the process before the model was there.
            cold: drop the files from the page cache before each step.
            plot: file for ``plot``.
        """
        self._pipeline, self._optimizer, self._batches = pipeline, optimizer, batches
        self._model, self._before, self._cold, self._plot = model, before, cold, plot

    def step(self) -> dict[str, Any]:
        """One step: its ``seconds``, ``losses``, seconds of waiting for layers, of reading and of copying them."""
        if self._cold:
            _drop(self._model)
        events: list[Span] = []
        self._pipeline.events = events
        results: list[StepResult] = []
        elapsed = seconds(
            lambda: results.append(tuning_step(self._pipeline, self._optimizer, self._batches, LossConfig(), 1.0))
        )
        spent = {
            kind: sum(each.end - each.start for each in events if each.kind == kind)
            for kind in ("wait", "read", "copy", "layer", "exits")
        }
        return {"seconds": elapsed, "losses": [exit_.loss for exit_ in results[0].exits], **spent}

    def plot(self) -> None:
        """Plot the last step."""
        assert self._plot is not None
        plot_timeline(self._pipeline.events or [], self._plot)

    def memory(self) -> dict[str, int]:
        """Bytes: ``peak`` of the device, or of this process without what it had before; ``planned``."""
        stage, (batch, *_) = self._pipeline.stage, self._batches
        setup, specs = stage.setup, [exit_.spec for exit_ in stage.exits]
        rows, tokens = batch.tokens.shape
        workload = Workload(
            itemsize=setup.dtype.itemsize,
            micro_batch_size=rows,
            sequence_length=tokens,
            microbatches=len(self._batches),
            chunk_tokens=LossConfig().chunk_tokens,
            tiles=setup.tiles,
            slots=STREAMED_SLOTS if setup.residency != "device" else 0,
        )
        planned = stage_memory(self._pipeline.layout, 0, setup.architecture, specs, workload).tuning
        return {"peak": platform.peak_memory() - self._before, "planned": planned}

    def layer_bytes(self) -> int:
        """Bytes of the layers that a step runs, in the model's files."""
        numbers = [number for number, _ in self._pipeline.stage.backbone.numbered_layers()]
        names = tuple(f"model.layers.{number - 1}." for number in numbers)
        return sum(tensor.nbytes for name, tensor in self._model.weights.items() if name.startswith(names))


@contextlib.contextmanager
def streamed(
    directory: str,
    residency: Residency,
    exits: list[int],
    dtype: str,
    tokens: int,
    microbatches: int,
    cold: bool,
    plot: str | None,
) -> Iterator[StreamedSide]:
    """Exits with the shared head, tuned on random tokens; ``tokens`` of each of ``microbatches``."""
    with process_groups() as groups:
        model = open_model(directory)
        before = 0 if platform.has_accelerator() else psutil.Process().memory_info().rss
        setup = build_setup(model.architecture, platform.DTYPES[dtype], groups, residency=residency)
        specs = [ExitSpec(layer, "mlp", "shared") for layer in exits]
        stage = Stage(setup, range(1, max(exits) + 1), specs)
        load_backbone(stage, model)
        for exit_ in stage.exits:
            initialise_exit(exit_, model, SEED)
        schedule = ScheduleConfig(decay="constant", warmup_fraction=0.0)
        optimizer = ExitOptimizer(stage.exits, setup.config, groups, OptimizerConfig(), schedule, STEPS)
        ids = torch.randint(
            model.architecture.vocab_size, (microbatches, tokens + 1), generator=torch.Generator().manual_seed(SEED)
        )
        mask = torch.ones(1, tokens, dtype=torch.bool)
        batches = [
            Batch(row[None, :-1], row[None, 1:], mask, tokens, range(number, number + 1))
            for number, row in enumerate(ids)
        ]
        yield StreamedSide(one_stage(stage), optimizer, batches, model, before, cold, plot)


def _drop(model: SavedModel) -> None:
    """Drop the model's files from the page cache."""
    files: set[Path] = {file for tensor in model.weights.values() for file in tensor.files}
    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
