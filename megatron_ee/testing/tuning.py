"""A few tuning steps on random data in any layout, to compare layouts with one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee import platform
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.packing import packed_slots
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.checkpoint.store import open_checkpoint
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import LossConfig, OptimizerConfig, Residency, ScheduleConfig, Weights
from megatron_ee.data.loader import Batch, Sample
from megatron_ee.exits.stage import Stage, build_stage
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import Groups, joined_processes, model_groups
from megatron_ee.parallel.layout import Layout, StageLayout
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.tuning.schedule import Pipeline, Span
from megatron_ee.tuning.state import RunProgress, load_state, save_state
from megatron_ee.tuning.step import StepResult, tuning_step
from megatron_ee.tuning.teacher import of_distillation

SEQUENCE_LENGTH, GLOBAL_BATCH, STEPS = 16, 12, 3


class RandomBlend:
    """Random sequences, of which one token in five is masked."""

    samples_per_epoch = (40,)

    def __init__(self, length: int) -> None:
        """``length``: tokens of a sequence."""
        self._length = length

    def __getitem__(self, index: int) -> Sample:
        """The sequence, always the same for an index."""
        generator = np.random.default_rng(index)
        tokens = generator.integers(0, 131, self._length + 1)
        return tokens[:-1], tokens[1:], generator.random(self._length) < 0.8


@dataclass(frozen=True)
class Case:
    """A model, its exits and their layout. ``stages``: per stage, (first layer, last layer) or None, and exits."""

    name: str
    family: str
    specs: tuple[ExitSpec, ...]
    stages: tuple[tuple[tuple[int, int] | None, tuple[int, ...]], ...]
    tensor: int = 1
    sequence: bool = False
    loss: LossConfig = field(default_factory=LossConfig)
    clip_grad: float = 0.05
    implementation: str = "auto"
    weight_decay: float = 0.01
    decay_towards: str = "zero"
    dtype: str = "float32"
    micro_batch_size: int = 1
    weights: Weights = "packed"
    residency: Residency = "device"

    @property
    def layout(self) -> Layout:
        """The layout of the stages."""
        return Layout(
            tuple(
                StageLayout(range(0) if ends is None else range(ends[0], ends[1] + 1), exits)
                for ends, exits in self.stages
            )
        )


@dataclass(frozen=True)
class Outcome:
    """Results of one rank: the steps' results, events of the last step, and the path of each step's checkpoint."""

    results: tuple[StepResult, ...]
    events: tuple[Span, ...]
    checkpoints: tuple[str, ...]


@torch.no_grad()
def layer_outputs(stage: Stage) -> list[Tensor]:
    """h after the last layer and the taps, ``[20, 1, hidden]``, of a stage with the embedding."""
    tokens = torch.arange(20, device=platform.device())[None]
    h, taps = stage.run_layers(stage.backbone.embed(tokens), stage.backbone.positions(20), to_end=True)
    return [h, *taps.values()]


def random_batches(vocab: int, step: int, rank: int, size: int, micro_batch_size: int) -> list[Batch]:
    """One data-parallel rank's microbatches of a step. They depend only on the step and the global batch position."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocab, (GLOBAL_BATCH, SEQUENCE_LENGTH + 1), generator=generator)
    mask = torch.rand(GLOBAL_BATCH, SEQUENCE_LENGTH, generator=generator) < 0.8
    batches = []
    for number in range(GLOBAL_BATCH // (micro_batch_size * size)):
        first = (number * size + rank) * micro_batch_size
        rows = slice(first, first + micro_batch_size)
        part = mask[rows]
        sequences = range(first, first + micro_batch_size)
        batches.append(Batch(tokens[rows, :-1], tokens[rows, 1:], part, int(part.sum()), sequences))
    return batches


def tune_cases(
    models: dict[str, Path], cases: Sequence[Case], output: Path, start: Path | None = None, steps: int = STEPS
) -> list[Outcome]:
    """Run each case in turn, on one rank, and save its state under ``output`` after the first and the last step.

    Args:
        models: directories by name.
        cases: to run.
        output: directory for checkpoints.
        start: output of an earlier call; cases of the same names continue after its first step.
        steps: number of steps. With ``start`` and 1, cases are saved as they were loaded.
    """
    with joined_processes() as control:
        return [_tune_case(models[case.family], case, output, start, steps, control) for case in cases]


def _tune_case(
    model_path: Path, case: Case, output: Path, start: Path | None, steps: int, control: dist.ProcessGroup
) -> Outcome:
    with model_groups(control, case.tensor, len(case.stages)) as groups:
        pipeline, optimizer = prepare(model_path, case, groups)
        description = {
            "backbone_sha256": "x",
            "exits": [dataclasses.asdict(s) for s in case.specs],
            "dtype": case.dtype,
        }
        progress, results, saved = RunProgress(), [], []
        if start is not None:
            checkpoint = open_checkpoint(start / case.name / "step-1")
            progress = load_state(checkpoint, pipeline.stage, optimizer, description)
        vocab = pipeline.stage.setup.architecture.vocab_size
        rank, size = groups.data.rank(), groups.data.size()
        while progress.step < steps:
            pipeline.events = []
            batches = random_batches(vocab, progress.step, rank, size, case.micro_batch_size)
            results.append(tuning_step(pipeline, optimizer, batches, case.loss, 1.0))
            progress.step += 1
            if progress.step == 1 and steps > 1:
                saved.append(save_state(output / case.name, pipeline.stage, optimizer, progress, description, keep=9))
        saved.append(save_state(output / case.name, pipeline.stage, optimizer, progress, description, keep=9))
        return Outcome(tuple(results), tuple(pipeline.events or ()), tuple(map(str, saved)))


def prepare(model_path: Path, case: Case, groups: Groups) -> tuple[Pipeline, ExitOptimizer]:
    """This rank's stage with its exits initialised, and their optimizer."""
    model, distillation = open_model(model_path), case.loss.distillation
    setup = build_setup(
        model.architecture,
        platform.DTYPES[case.dtype],
        groups,
        sequence_parallel=case.sequence,
        slots=packed_slots(model, case.weights),
        residency=case.residency,
    )
    stage = build_stage(setup, case.layout, case.specs, final_exit=distillation.kl > 0)
    load_backbone(stage, model)
    for exit_ in stage.exits:
        initialise_exit(exit_, model, 1)
    settings = OptimizerConfig(
        lr=1e-2,
        min_lr=1e-3,
        clip_grad=case.clip_grad,
        implementation=case.implementation,  # type: ignore[arg-type]
        weight_decay=case.weight_decay,
        decay_towards=case.decay_towards,  # type: ignore[arg-type]
    )
    optimizer = ExitOptimizer(stage.exits, setup.config, groups, settings, ScheduleConfig(), STEPS)
    return Pipeline(stage, case.layout, case.specs, teacher=of_distillation(distillation)), optimizer
