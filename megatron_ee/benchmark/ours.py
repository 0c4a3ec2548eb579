"""Our side: the tuning step as ``megatron-ee tune`` runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_ee import platform
from megatron_ee.benchmark.machine import SEED, random_batch, seconds
from megatron_ee.benchmark.shape import Step, our_flops
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.loading import load_backbone, open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import LossConfig, OptimizerConfig, ScheduleConfig
from megatron_ee.model.setup import build_setup
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.tuning.schedule import one_stage
from megatron_ee.tuning.step import StepResult, tuning_step

STEPS = 1_000_000  # of the schedule: never reached


@contextlib.contextmanager
def ours(step: Step) -> Iterator[Ours]:
    """For a worker: stage and optimizer, ready for the first step."""
    with process_groups() as groups:
        model = open_model(step.directory)
        setup = build_setup(model.architecture, platform.DTYPES[step.dtype], groups)
        stage = Stage(setup, range(1, max(step.exits) + 1), [ExitSpec(layer) for layer in step.exits])
        load_backbone(stage, model)
        for exit_ in stage.exits:
            initialise_exit(exit_, model, SEED)
        schedule = ScheduleConfig(decay="constant", warmup_fraction=0.0)
        yield Ours(step, stage, ExitOptimizer(stage.exits, setup.config, groups, OptimizerConfig(), schedule, STEPS))


class Ours:
    """Runs one step at a time."""

    def __init__(self, step: Step, stage: Stage, optimizer: ExitOptimizer) -> None:
        self._step, self._stage, self._optimizer = step, stage, optimizer
        self._pipeline = one_stage(stage)
        self._batch = random_batch(step.shape.vocab, step.tokens)
        self._loss = LossConfig(chunk_tokens=step.chunk_tokens)

    def step(self) -> dict[str, Any]:
        """Forward, backward and update: ``seconds``, ``losses`` per exit before it, ``grad_norm`` before clipping."""
        results: list[StepResult] = []
        elapsed = seconds(
            lambda: results.append(tuning_step(self._pipeline, self._optimizer, [self._batch], self._loss, 1.0))
        )
        losses = [exit_.loss for exit_ in results[0].exits]
        return {"seconds": elapsed, "losses": losses, "grad_norm": results[0].grad_norm}

    def peak_memory(self) -> int:
        """Bytes."""
        return platform.peak_memory()

    def flops(self) -> int:
        """Counted operations of one step."""
        return our_flops(self._step, self._stage.setup.padded_vocab).total
