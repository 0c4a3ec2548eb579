"""How long one tuning step takes on a machine, and in which parts. Pure: no process group is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.parallel.layout import Layout
from megatron_ee.planning.activations import by_layer
from megatron_ee.planning.costs import exit_flops
from megatron_ee.planning.devices import DISK, HOST_BANDWIDTH
from megatron_ee.planning.machine import Machine, group_link
from megatron_ee.planning.parameters import (
    hosted_by,
    layer_bytes,
    layer_matrices,
    layer_parameters,
    stage_parameters,
    trained_parameters,
)
from megatron_ee.planning.plan import StageWork, schedule_end, stage_work
from megatron_ee.planning.traffic import StageTraffic, stage_traffic
from megatron_ee.planning.workload import FLOAT32, Workload

HOST_STATE = 28
"""Bytes of host memory that AdamW reads and writes for each float32 weight."""
EXPANSION = 12
"""Bytes of the device's memory that are read and written to expand a packed weight, in operations that are not fused:
codes are converted, their zero is subtracted, and they are multiplied by the scale."""


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage in one step.

    Attributes:
        layers: frozen layers, with the expansion of packed ones, and the final exit as a teacher.
        exits: forward and backward of the exits.
        tensor: reductions over tensor-parallel ranks, for which the other work waits.
        gradients: the part of the reductions over data-parallel ranks that no other work hides.
        update: zeroing, norms, clipping and AdamW; with the optimizer in host memory also the copies of gradients that
            no other work hides.
    """

    layers: float
    exits: float
    tensor: float
    gradients: float
    update: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: until the busiest stage is done, with its update.

    Attributes:
        stages: work of each stage.
        seconds: of the whole step.
    """

    stages: tuple[StageTime, ...]
    seconds: float


def step_time(
    layout: Layout, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload, machine: Machine
) -> StepTime:
    """Estimate a step.

    Products take their FLOPs at the machine's rates, but at least as long as reading their weights. Messages between
    stages and the gradients of all but the last exit overlap with work.
    """
    counted = stage_work(layout, architecture, specs, workload)
    traffic = [stage_traffic(layout, index, architecture, specs, workload) for index in range(len(layout.stages))]
    work, stages, after = list[StageWork](), list[StageTime](), 0.0
    transfer: dict[tuple[int, int], float] = {}
    between = group_link(machine, workload.tensor * workload.data * len(layout.stages), 1)
    for index, (flops, bytes_) in enumerate(zip(counted, traffic, strict=True)):
        seconds, stage = _stage(layout, index, architecture, specs, workload, machine, flops, bytes_)
        work.append(seconds)
        stages.append(stage)
        after = max(after, stage.gradients + stage.update)
        transfer |= {(index, target): size / between for target, size in bytes_.messages.items()}
    distillation = workload.top_k > 0
    end = schedule_end(layout, work, workload.microbatches, distillation=distillation, transfer=transfer)
    # Streamed layers are read once per step, under the work on the layer before.
    end = max(end, streaming_seconds(len(layout.stages[0].layers), architecture, workload, machine))
    return StepTime(tuple(stages), end + after)


def _stage(
    layout: Layout,
    index: int,
    architecture: Architecture,
    specs: Sequence[ExitSpec],
    workload: Workload,
    machine: Machine,
    flops: StageWork,
    traffic: StageTraffic,
) -> tuple[StageWork, StageTime]:
    """Seconds of a stage's work on one microbatch, and in a step."""
    ranks, count = workload.tensor, workload.microbatches
    frozen, trained = stage_parameters(
        layout, index, architecture, specs, workload.tensor, distillation=workload.top_k > 0
    )
    link = group_link(machine, ranks, 1)
    reading = frozen * workload.itemsize / machine.bandwidth if flops.forward else 0.0
    forward = max(flops.forward / ranks / machine.layers, reading)
    # Where all microbatches pass a layer before the next one, it is expanded once.
    passes = 1 if by_layer(layout, workload) else count
    expanding = expanding_seconds(len(layout.stages[index].layers), architecture, workload, machine)
    forward += passes * expanding / count
    teacher = flops.teacher / ranks / machine.layers
    exits = flops.exits / ranks / machine.exits
    work = StageWork(forward + traffic.layers / link, teacher, exits + traffic.exits / link)
    data = group_link(machine, workload.data, ranks)
    last = max(traffic.gradients.values(), default=0)
    return work, StageTime(
        layers=count * (forward + teacher),
        exits=count * exits,
        tensor=count * (traffic.layers + traffic.exits) / link,
        gradients=(last + traffic.weights) / data,
        update=_update(trained, workload, machine)
        + _waiting(layout, index, architecture, specs, workload, machine, forward),
    )


def streaming_seconds(layers: int, architecture: Architecture, workload: Workload, machine: Machine) -> float:
    """Seconds of reading so many layers once, on each rank; 0 if they stay on the device.

    All ranks of a machine share its storage. What is read from there crosses the link from the host too, meanwhile; the
    layers of a quantised release are expanded in between.
    """
    if workload.residency == "device":
        return 0.0
    itemsize, tensor = workload.itemsize, workload.tensor
    seconds = layers * layer_parameters(architecture, tensor) * itemsize / machine.host_link
    if workload.residency == "disk":
        stored = layers * layer_bytes(architecture, itemsize, architecture.packed_bits, tensor)
        seconds = max(seconds, stored * min(machine.devices, tensor * workload.data) / DISK)
    return seconds


def expanding_seconds(layers: int, architecture: Architecture, workload: Workload, machine: Machine) -> float:
    """Seconds of expanding so many packed layers once, on each rank; 0 if they are not packed."""
    if not workload.packed_bits:
        return 0.0
    return layers * layer_matrices(architecture, workload.tensor) * EXPANSION / machine.bandwidth


def _update(trained: int, workload: Workload, machine: Machine) -> float:
    seconds = update_bytes(trained, workload) / machine.bandwidth
    if workload.host_optimizer:  # a weight is sent while the next one is updated
        own = -(-trained // workload.data)
        seconds += max(workload.itemsize * own / machine.host_link, HOST_STATE * own / HOST_BANDWIDTH)
    return seconds


def _waiting(
    layout: Layout,
    index: int,
    architecture: Architecture,
    specs: Sequence[ExitSpec],
    workload: Workload,
    machine: Machine,
    forward: float,
) -> float:
    """Seconds from the end of a stage's work until the gradients of its exits are in host memory.

    An exit's gradients are copied after its last backward, beside the work that follows: that of the next exits in the
    last microbatch, or where all microbatches pass a layer before the next one, that of the next layers and exits. A
    CPU copies them beside nothing.

    Args:
        forward: seconds of the stage's layers, for one microbatch.
    """
    if not workload.host_optimizer:
        return 0.0
    stage, waiting, done = layout.stages[index], 0.0, 0
    in_turn = by_layer(layout, workload) and not workload.top_k
    for spec in sorted(hosted_by(stage, specs), key=lambda spec: spec.layer):
        flops = workload.micro_batch_size * exit_flops(architecture, spec, workload.sequence_length, workload.tensor)
        work = flops / workload.tensor / machine.exits
        if in_turn:
            work = workload.microbatches * (work + (spec.layer - done) * forward / len(stage.layers))
        own = -(-trained_parameters(architecture, spec, workload.tensor) // workload.data)
        waiting = max(0.0, waiting - machine.accelerator * work) + FLOAT32 * own / machine.host_link
        done = spec.layer
    return waiting


def update_bytes(trained: int, workload: Workload) -> int:
    """Bytes of the device's memory that the end of a step reads and writes, for trained parameters of a rank.

    Gradients are written to zero them, read for their norm, and read and written to clip them. AdamW reads gradient,
    weight, the rest of the float32 weight and two moments, and writes all but the gradient.
    """
    own = -(-trained // workload.data)
    rest = workload.remainder if workload.itemsize < FLOAT32 else 0
    adam = 0 if workload.host_optimizer else own * (FLOAT32 + 2 * (workload.itemsize + rest + 2 * FLOAT32))
    return FLOAT32 * (3 * trained + own) + adam
