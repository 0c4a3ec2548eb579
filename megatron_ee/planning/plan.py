"""The plan of a run, before anything is loaded: content, work, idle time and memory of each stage.

Pure: no process group is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import RunConfig
from megatron_ee.parallel.costs import final_exit_flops
from megatron_ee.parallel.layout import Layout
from megatron_ee.planning.costs import exit_flops, layer_flops
from megatron_ee.planning.memory import Memory, stage_memory
from megatron_ee.planning.parameters import stage_parameters
from megatron_ee.planning.workload import Workload, make_workload

MOST_SIMULATED = 1024
"""Microbatches whose schedule is simulated. The stages are filled long before."""


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        layers: numbers of its layers, from 1.
        kept: numbers of layers that are loaded for validation only.
        exits: layers of the exits that it hosts.
        frozen_parameters: number per rank.
        trained_parameters: number per rank.
        flops: FLOPs of one step, over all tensor-parallel ranks, for one data-parallel replica.
        idle: share of a step in which it waits for other stages.
        memory: memory per rank.
    """

    layers: range
    kept: range
    exits: tuple[int, ...]
    frozen_parameters: int
    trained_parameters: int
    flops: int
    idle: float
    memory: Memory


@dataclass(frozen=True)
class RunPlan:
    """All stages, in pipeline order; ``tensor`` and ``data`` are the parallel sizes."""

    stages: tuple[StagePlan, ...]
    tensor: int
    data: int
    microbatches: int

    @property
    def efficiency(self) -> float:
        """Mean share of a step in which a stage computes."""
        return 1 - sum(stage.idle for stage in self.stages) / len(self.stages)

    @property
    def reference(self) -> float:
        """``M / (M + P - 1)``: efficiency of equal stages that send a microbatch only after all work on it is done."""
        return self.microbatches / (self.microbatches + len(self.stages) - 1)


@dataclass(frozen=True)
class StageWork:
    """Work of one stage on one microbatch, in FLOPs or seconds.

    Attributes:
        forward: work of its layers; h and taps are sent after it.
        teacher: work of the final exit, on the last stage with layers, with distillation.
        exits: work of the exits that it hosts.
    """

    forward: float
    teacher: float
    exits: float

    @property
    def total(self) -> float:
        """Total work."""
        return self.forward + self.teacher + self.exits


def plan_run(
    config: RunConfig,
    layout: Layout,
    architecture: Architecture,
    specs: Sequence[ExitSpec],
    world_size: int,
    *,
    accelerator: bool = True,
) -> RunPlan:
    """Call ``make_plan`` for a checked configuration and ``world_size`` processes, which have accelerators or not.

    ``auto`` in ``model.dtype`` must already be resolved.
    """
    return make_plan(
        layout, architecture, specs, make_workload(config, architecture, world_size, accelerator=accelerator)
    )


def make_plan(layout: Layout, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload) -> RunPlan:
    """Count the memory and work of each stage of ``layout``; ``specs`` are the exits of all stages."""
    work = stage_work(layout, architecture, specs, workload)
    idle = idle_shares(layout, work, workload.microbatches, distillation=workload.top_k > 0)
    stages = []
    for index, stage in enumerate(layout.stages):
        frozen, trained = stage_parameters(
            layout.whole, index, architecture, specs, workload.tensor, distillation=workload.final_exit
        )
        flops = int(work[index].total) * workload.microbatches
        memory = stage_memory(layout, index, architecture, specs, workload)
        stages.append(StagePlan(stage.layers, stage.kept, stage.exits, frozen, trained, flops, idle[index], memory))
    return RunPlan(tuple(stages), workload.tensor, workload.data, workload.microbatches)


def stage_work(
    layout: Layout, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload
) -> list[StageWork]:
    """FLOPs of each stage for one microbatch, summed over its tensor-parallel ranks."""
    tokens, sequences, teaches = workload.sequence_length, workload.micro_batch_size, workload.top_k > 0
    layers = layer_flops(architecture, specs, tokens, teaches)
    final = final_exit_flops(architecture, tokens, workload.tensor) if teaches else 0
    exits = {spec.layer: exit_flops(architecture, spec, tokens, workload.tensor) for spec in specs}
    return [
        StageWork(
            forward=sequences * sum(layers[layer - 1] for layer in stage.layers),
            teacher=sequences * final * (index == layout.last_layered),
            exits=sequences * sum(exits[layer] for layer in stage.exits),
        )
        for index, stage in enumerate(layout.stages)
    ]


def idle_shares(
    layout: Layout, work: Sequence[StageWork], microbatches: int, *, distillation: bool = False
) -> list[float]:
    """Share of a step in which each stage waits, if transfer takes no time; see ``schedule_end``."""
    end = schedule_end(layout, work, microbatches, distillation=distillation)
    return [1 - microbatches * stage.total / end for stage in work]


def schedule_end(
    layout: Layout,
    work: Sequence[StageWork],
    microbatches: int,
    *,
    distillation: bool = False,
    transfer: Mapping[tuple[int, int], float] = MappingProxyType({}),
) -> float:
    """When the last stage is done with a step, in the unit of ``work``.

    This simulates the schedule (``tuning.schedule``). A stage starts a microbatch when its h and taps have arrived; a
    stage sends them before its exits' work. With distillation a stage's exits run ``Layout.lag`` microbatches late and
    wait for the final exit. Only the first ``MOST_SIMULATED`` microbatches are simulated. After them the busiest stage
    no longer waits.

    Args:
        layout: of all stages.
        work: of each stage, on one microbatch.
        microbatches: of a step.
        distillation: whether exits wait for the final exit.
        transfer: time of a message, by source and target. Messages overlap with work and each other.
    """
    lags = [layout.lag(index) if distillation else 0 for index in range(len(work))]
    sources: list[set[int]] = [set() for _ in work]
    for message in layout.messages:
        sources[message.target].add(message.source)
    simulated = min(microbatches, MOST_SIMULATED)
    rest = (microbatches - simulated) * max(stage.total for stage in work)
    free = [0.0] * len(work)
    left = [[0.0] * simulated for _ in work]  # when h and taps leave a stage
    taught = [0.0] * simulated  # when a teacher message leaves the last stage with layers
    last = layout.last_layered

    def run_exits(index: int, number: int) -> None:
        if distillation and index != last and work[index].exits:
            free[index] = max(free[index], taught[number] + transfer.get((last, index), 0.0))
        free[index] += work[index].exits

    # A stage's turn depends only on earlier turns of later stages, because teacher messages arrive within its lag.
    for turn in range(simulated + max(lags)):
        for index, stage in enumerate(work):
            if turn < simulated:
                arrived = (left[source][turn] + transfer.get((source, index), 0.0) for source in sources[index])
                there = max(arrived, default=0.0)
                free[index] = left[index][turn] = max(free[index], there) + stage.forward
                if index == last:
                    free[index] = taught[turn] = free[index] + stage.teacher
        for index in range(len(work)):
            if 0 <= turn - lags[index] < simulated:
                run_exits(index, turn - lags[index])
    return max(free) + rest
