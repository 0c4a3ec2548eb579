"""One process of a tuning step that several share: a random stage in memory, its steps, and its work alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.benchmark.machine import SEED, random_batch, seconds
from megatron_ee.benchmark.ranks import ParallelStep, launcher_environment
from megatron_ee.config.schema import DistillationConfig, LossConfig, OptimizerConfig, ScheduleConfig
from megatron_ee.errors import UserError
from megatron_ee.model.distillation import Teacher
from megatron_ee.model.setup import build_setup
from megatron_ee.model.stage import Stage, build_stage
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.step import StepResult, tuning_step

STEPS = 1_000_000  # of the schedule: never reached
KINDS = ("forward", "teach", "exits")
Spans = list[tuple[str, int, float, float]]
"""Kind, microbatch, start and end of what a stage did; seconds on a clock that the machine's processes share."""


@contextlib.contextmanager
def rank(step: ParallelStep, number: int, port: int, lock: str, on_host: bool) -> Iterator[Rank]:
    """For a worker: the object below; see ``ranks.started_ranks``."""
    if on_host:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= launcher_environment(number, step.world_size, port)
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        yield Rank(step, lock, stack)


@dataclass
class Rank:
    """Every method is called on all ranks at the same time, after ``prepare``.

    Attributes:
        step: what is tuned.
        lock: file that ranks lock to compute one at a time.
        stack: closes the process groups.
    """

    step: ParallelStep
    lock: str
    stack: contextlib.ExitStack

    def prepare(self) -> None:
        """Meet the other ranks; make the stage, its exits and their optimizer.

        Raises:
            UserError: there are fewer devices than ranks.
        """
        step = self.step
        if platform.has_accelerator() and torch.cuda.device_count() < step.world_size:
            raise UserError(f"{step.world_size} ranks need as many GPUs; this machine has {torch.cuda.device_count()}")
        groups = self.stack.enter_context(process_groups(step.workload.tensor, len(step.layout.stages)))
        self.held_before = platform.peak_memory()
        setup = build_setup(
            step.architecture,
            platform.DTYPES[step.dtype],
            groups,
            sequence_parallel=step.workload.sequence_parallel,
        )
        stage = build_stage(setup, step.layout, step.specs, final_exit=step.workload.top_k > 0)
        fill_stage(stage, SEED + groups.rank)
        schedule = ScheduleConfig(decay="constant", warmup_fraction=0.0)
        self.optimizer = ExitOptimizer(stage.exits, setup.config, groups, OptimizerConfig(), schedule, STEPS)
        self.pipeline = Pipeline(stage, step.layout, step.specs, top_k=step.workload.top_k)
        self.batches = [random_batch(step.architecture.vocab_size, step.workload.sequence_length)]
        self.batches *= step.workload.microbatches
        distillation = DistillationConfig(kl=float(step.workload.top_k > 0), top_k=step.workload.top_k)
        self.loss = LossConfig(chunk_tokens=step.workload.chunk_tokens, distillation=distillation)

    def describe(self) -> dict[str, Any]:
        """Device, threads and library, as they stand beside the figures."""
        device = torch.cuda.get_device_name() if platform.has_accelerator() else "cpu"
        return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}

    def run_step(self) -> dict[str, Any]:
        """A tuning step: ``seconds``, the ``losses`` of all exits before it, and what this stage did (``spans``)."""
        self.pipeline.events = []
        results: list[StepResult] = []
        elapsed = seconds(lambda: results.append(self._tune()))
        if results[0].skipped:
            raise RuntimeError(results[0].skipped)
        return {"seconds": elapsed, "losses": [exit_.loss for exit_ in results[0].exits], "spans": self._spans()}

    def measure_alone(self) -> dict[str, float]:
        """A tuning step in which one rank computes at a time: median seconds of each kind of work on a microbatch."""
        pipeline = self.pipeline
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}

        def alone(kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                with open(self.lock, "ab") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    start = time.perf_counter()
                    result = work(*arguments, **options)
                    times[kind].append(time.perf_counter() - start)
                return result

            return run

        def run_pipeline(batches: Any, exits_work: Any, at_end: Any = None, **options: Any) -> None:
            run(batches, alone("exits", exits_work), at_end and alone("teach", at_end), **options)

        run = pipeline.run
        run_layers = alone("forward", pipeline.stage.run_layers)
        with (
            mock.patch.object(pipeline.stage, "run_layers", run_layers),
            mock.patch.object(pipeline, "run", run_pipeline),
        ):
            self._tune()
        return {kind: statistics.median(values) if values else 0.0 for kind, values in times.items()}

    def run_waiting(self, times: list[dict[str, float]]) -> dict[str, Any]:
        """The pipeline with waits of these seconds, per rank, in place of computing, and real transfers: ``spans``."""
        pipeline, mine = self.pipeline, times[self.pipeline.stage.setup.groups.rank]
        place, workload = self.step.layout.stages[pipeline.index], self.step.workload
        tokens, top_k = workload.tokens, workload.top_k
        shape, dtype = (tokens, 1, self.step.architecture.hidden_size), pipeline.stage.setup.dtype
        h = torch.zeros(shape, dtype=dtype)
        taps = {spec.layer: h for spec in self.step.specs if spec.layer in place.layers}

        def forward(*_: Any, **__: Any) -> tuple[Tensor, dict[int, Tensor]]:
            time.sleep(mine["forward"])
            return h, dict(taps)

        def teach(*_: Any) -> Teacher:
            time.sleep(mine["teach"])
            return Teacher(torch.zeros(tokens, top_k, dtype=torch.long), torch.zeros(tokens, top_k))

        def work(*_: Any) -> None:
            time.sleep(mine["exits"])

        pipeline.events = []
        with mock.patch.object(pipeline.stage, "run_layers", forward):
            pipeline.run(self.batches, work, teach if top_k else None, taught=bool(top_k))
        return {"spans": self._spans()}

    def traffic(self) -> list[tuple[int, int, bool, int, int]]:
        """Per link from this stage: source, target, whether a teacher's verdicts, messages so far, their bytes."""
        return [
            (self.pipeline.index, link.target, link.verdicts, link.messages, link.bytes)
            for link in self.pipeline.sent()
        ]

    def memory(self) -> dict[str, int]:
        """Bytes ``before`` the stage was made, with the libraries loaded, and at the ``peak``, both of the rank.

        And ``graph_tokens``, which the peak depends on.
        """
        return {
            "before": self.held_before,
            "peak": platform.peak_memory(),
            "graph_tokens": self.pipeline.stage.setup.tiles.graph_tokens,
        }

    def _tune(self) -> StepResult:
        return tuning_step(self.pipeline, self.optimizer, self.batches, self.loss, 1.0)

    def _spans(self) -> Spans:
        return [(event.kind, event.microbatch, event.start, event.end) for event in self.pipeline.events or ()]


@torch.no_grad()
def fill_stage(stage: Stage, seed: int) -> None:
    """Random values in place: products keep the size of what goes in; exits copy their layer's MLP where it is here."""
    generator = torch.Generator(platform.device()).manual_seed(seed)
    for parameter in stage.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    layers = dict(stage.backbone.numbered_layers())
    for exit_ in stage.exits:
        if exit_.mlp is not None and exit_.spec.layer in layers:
            exit_.mlp.load_state_dict(layers[exit_.spec.layer].mlp.state_dict())
