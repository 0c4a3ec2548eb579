"""The package's tuning step on one rank of an example configuration."""

from __future__ import annotations

import torch

from megatron_ee import platform
from megatron_ee.checkpoint.packing import SCRATCH
from megatron_ee.config.schema import RunConfig
from megatron_ee.data.loader import Batch
from megatron_ee.exits.stage import Stage, build_stage
from megatron_ee.model.packed import Grid, PackedMatrix
from megatron_ee.model.setup import build_setup
from megatron_ee.model.slots import Event, Slot
from megatron_ee.model.streaming import stream_from_host
from megatron_ee.parallel.groups import Groups, process_groups
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.parallel.tiles import PACKED_SLOTS
from megatron_ee.planning.balance import resolve_layout
from megatron_ee.planning.plan import plan_run
from megatron_ee.planning.traffic import StageTraffic, stage_traffic
from megatron_ee.planning.workload import make_workload
from megatron_ee.testing.examples import example_architecture, open_example
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.step import tuning_step
from megatron_ee.tuning.teacher import of_distillation

from .cluster import as_rank
from .runs import Result, Tuning
from .watch import Watch


def run(case: Tuning, explained: int | None = None) -> Result:
    """Build a rank's stage as ``tuning.run`` does, without values, and run two steps: the second is counted, and
    the first has one microbatch.

    Args:
        explained: bytes whose composition is wanted, such as an earlier result's ``peak``.
    """
    architecture = example_architecture(case.example, case.window, case.model)
    config, specs, processes = open_example(case.example, case.overrides, case.processes, case.model)
    rank, parallel, taught = case.rank % processes, config.parallel, config.loss.distillation.kl > 0
    layout = resolve_layout(parallel, specs, architecture, config.data.sequence_length, taught)
    plan, workload = (
        plan_run(config, layout, architecture, specs, processes),
        make_workload(config, architecture, processes),
    )
    with (
        as_rank(rank, processes, explained) as watch,
        process_groups(parallel.tensor, parallel.pipeline) as groups,
    ):
        dtype = platform.DTYPES[config.model.dtype]
        residency = config.model.residency
        slots = PACKED_SLOTS if config.model.quantise == "int4" else 0
        setup = build_setup(
            architecture, dtype, groups, sequence_parallel=parallel.sequence, residency=residency, slots=slots
        )
        stage = build_stage(setup, layout, specs, final_exit=taught)
        if slots:
            _pack(stage)
        elif stage.backbone.slots is not None:
            stream_from_host(stage.backbone.slots, lambda number, tensors: None)
        optimizer = ExitOptimizer(stage.exits, setup.config, groups, config.optimizer, config.schedule, 10)
        pipeline = Pipeline(stage, layout, specs, teacher=of_distillation(config.loss.distillation))
        batches = [make_batch(config, number) for number in range(case.microbatches)]
        for counted in (batches[:1], batches):  # AdamW makes its state in the first step
            before = watch.peak
            watch.restart()
            tuning_step(pipeline, optimizer, counted, config.loss, 1.0)
        index, tensor, data = (group.rank() for group in (groups.pipeline, groups.tensor, groups.data))
        planned = plan.stages[index].memory
        return Result(
            name=case.name,
            where=f"rank {rank} of {processes}: stage {index}, tensor {tensor}, data {data}",
            planned=planned.tuning,
            peak=max(before, watch.peak),
            launches=sum(watch.launches.values()),
            syncs=dict(watch.syncs),
            units={"step": 1, "microbatch": case.microbatches},
            attention=dict(watch.attention),
            faults=tuple(watch.faults),
            launches_by_place=dict(watch.places.most_common(12)),
            composition=watch.composition,
            sent=_sent(watch, stage_traffic(layout, index, architecture, specs, workload), case, groups),
            activations=planned.activations + planned.taps,
        )


def _sent(watch: Watch, planned: StageTraffic, case: Tuning, groups: Groups) -> dict[str, tuple[int, int]]:
    """Bytes sent and planned. Groups are told apart by their size."""
    between, tensor, data = planned.per_step(case.microbatches)
    sizes = groups.tensor.size(), groups.data.size()
    found = {"stages": (watch.sent["send"], between)}
    if sizes[0] != sizes[1] or sizes == (1, 1):
        found["tensor"] = watch.sent[f"group of {sizes[0]}"], tensor
        found["data"] = watch.sent[f"group of {sizes[1]}"], data
    return found


def _pack(stage: Stage) -> None:
    """Let a stage's slot be filled from codes of 4 bits without values."""
    slots, group = stage.backbone.slots, 128
    assert slots is not None
    packed, kept = {}, {}
    with torch.device(platform.device()):
        for number in slots.numbers:
            for name, tensor in slots.slots[0].tensors.items():
                if tensor.ndim == 1:
                    kept[number, name] = torch.empty_like(tensor)
                    continue
                rows, columns = tensor.shape
                codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
                scale = torch.empty(rows, columns // group, dtype=tensor.dtype)
                packed[number, name] = PackedMatrix(codes, columns, 4, scale, 8.0, Grid(1, group))

    def fill(number: int, slot: Slot, event: Event) -> None:
        for name, tensor in slot.tensors.items():
            if tensor.ndim == 1:
                tensor.data.copy_(kept[number, name])
            else:
                packed[number, name].expand(tensor.data, elements=SCRATCH)

    slots.fill = fill


def make_batch(config: RunConfig, number: int) -> Batch:
    """A microbatch without masked tokens."""
    rows, length = config.tuning.micro_batch_size, config.data.sequence_length
    tokens = torch.ones(rows, length, dtype=torch.int64)
    mask = torch.ones(rows, length, dtype=torch.bool)
    return Batch(tokens, tokens.clone(), mask, rows * length, range(number * rows, (number + 1) * rows))
