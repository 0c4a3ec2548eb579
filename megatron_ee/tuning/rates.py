"""Measures the machine at hand for the plan of a run: some layers and exits of its shapes, with random weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_ee import platform
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import DistillationConfig, LossConfig, ParallelConfig, RunConfig, ScheduleConfig
from megatron_ee.data.loader import Batch
from megatron_ee.errors import ConfigError
from megatron_ee.exits.stage import Stage
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import Groups, process_groups, world_size
from megatron_ee.parallel.layout import Layout, StageLayout
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.planning.devices import GB
from megatron_ee.planning.machine import Machine
from megatron_ee.planning.plan import make_plan, stage_work
from megatron_ee.planning.step_time import update_bytes
from megatron_ee.planning.workload import Workload, make_workload
from megatron_ee.tuning.schedule import one_stage
from megatron_ee.tuning.step import tuning_step

REPEATS = 3
LONGEST = 20.0
"""Seconds of a step above which fewer tokens are measured."""
LEAST_TOKENS = 256
PRODUCT = 1024
"""Rows of the square matrices whose product is timed."""
MESSAGE = 2**22
"""float32 numbers that are all-reduced to time the link."""


def measure_machine(config: RunConfig, architecture: Architecture, specs: Sequence[ExitSpec]) -> Machine:
    """Measure this process's device, while all ranks measure theirs, and the link between them. Every rank calls this.

    Args:
        config: of the run, its ``model.dtype`` resolved.
        architecture: of the model.
        specs: the run's exits, of which one of each kind is measured.

    Raises:
        ConfigError: there is not enough memory to measure.
    """
    ranks = world_size()
    with process_groups(pipeline=ranks) as groups:
        link = _link_rate(groups) if ranks > 1 else float("inf")
        small, kinds = _sample(architecture, specs)
        free = platform.free_memory(groups.gather(platform.memory_name()).count(platform.memory_name()))
        dtype = platform.DTYPES[config.model.dtype]
        products = _product_rate(dtype)
        workload = _workload(config, small, kinds, products, free)
        layout = Layout((_place(small, kinds),))
        work = stage_work(layout, small, kinds, workload)[0]
        forward, exits, update = _step_seconds(config, small, kinds, workload, _alone(groups))
        trained = make_plan(layout, small, kinds, workload).stages[0].trained_parameters
        layers_rate, exits_rate = work.forward / forward, work.exits / exits
        bandwidth = update_bytes(trained, workload) / update
        return Machine(
            name=platform.device_name(),
            memory=float(min(groups.gather(free))),
            layers=layers_rate,
            exits=exits_rate,
            float32=_product_rate(torch.float32),
            float64=_product_rate(torch.float64),
            bandwidth=bandwidth,
            link=link,
            network=link,
            host_link=_copy_rate(),
            devices=max(1, ranks),
            watts=None,
            accelerator=platform.has_accelerator(),
            host_memory=float(min(groups.gather(platform.free_host_memory()))) if platform.has_accelerator() else None,
            basis=(
                f"measured just now on this machine ({platform.device_name()}), at {workload.micro_batch_size} x "
                f"{workload.sequence_length} tokens in {config.model.dtype}: frozen layers {layers_rate / 1e9:,.1f} "
                f"GFLOP/s, exits {exits_rate / 1e9:,.1f}, a product of matrices {products / 1e9:,.1f}; update "
                f"{bandwidth / GB:,.2f} GB/s" + (f"; link {link / GB:,.2f} GB/s" if ranks > 1 else ""),
            ),
        )


def _sample(architecture: Architecture, specs: Sequence[ExitSpec]) -> tuple[Architecture, tuple[ExitSpec, ...]]:
    """The first layers of the model, and an exit of each kind after the last ones of them."""
    kinds = list({(spec.body, spec.head, spec.rank): spec for spec in specs}.values())
    count = min(architecture.num_layers, max(2, len(kinds)))
    kinds = kinds[:count]
    small = dataclasses.replace(
        architecture,
        num_layers=count,
        windows=architecture.windows[:count],
        rotated=architecture.rotated[:count],
    )
    first = count - len(kinds) + 1
    placed = [
        dataclasses.replace(spec, layer=first + place, init="copy", gate=False) for place, spec in enumerate(kinds)
    ]
    return small, tuple(placed)


def _workload(
    config: RunConfig, small: Architecture, kinds: Sequence[ExitSpec], products: float, free: int
) -> Workload:
    """One microbatch of the run on one rank; fewer tokens if a step would take long.

    Raises:
        ConfigError: there is not enough memory.
    """
    alone = dataclasses.replace(config, parallel=ParallelConfig(), loss=_plain_loss(config))
    workload = dataclasses.replace(
        make_workload(alone, small, 1, accelerator=platform.has_accelerator()), microbatches=1
    )
    layout = Layout((_place(small, kinds),))
    while stage_work(layout, small, kinds, workload)[0].total / products > LONGEST:
        if workload.micro_batch_size > 1:
            workload = dataclasses.replace(workload, micro_batch_size=workload.micro_batch_size // 2)
        elif workload.sequence_length >= 2 * LEAST_TOKENS:
            workload = dataclasses.replace(workload, sequence_length=workload.sequence_length // 2)
        else:
            break
    needed = make_plan(layout, small, kinds, workload).stages[0].memory.tuning
    if needed > free:
        raise ConfigError(
            f"--measured: measuring some layers and exits takes {needed / GB:,.1f} GB, but {free / GB:,.1f} are free; "
            "name a device with --gpu instead"
        )
    return workload


def _plain_loss(config: RunConfig) -> LossConfig:
    return dataclasses.replace(config.loss, distillation=DistillationConfig())


def _place(small: Architecture, kinds: Sequence[ExitSpec]) -> StageLayout:
    return StageLayout(range(1, small.num_layers + 1), tuple(spec.layer for spec in kinds))


def _alone(groups: Groups) -> Groups:
    """Groups in which this rank is the only one. Every rank calls this."""
    own = dist.new_group([groups.rank], use_local_synchronization=True)
    return dataclasses.replace(groups, pipeline=own, teacher=own, world=own, control=own, saving=own)


def _step_seconds(
    config: RunConfig, small: Architecture, kinds: Sequence[ExitSpec], workload: Workload, groups: Groups
) -> tuple[float, float, float]:
    """Seconds of the layers and of the exits for one microbatch, and of the rest of a step."""
    setup = build_setup(small, platform.DTYPES[config.model.dtype], groups)
    stage = Stage(setup, range(1, small.num_layers + 1), kinds)
    for parameter in stage.parameters():
        parameter.data.normal_(0, 0.02)
    optimizer = ExitOptimizer(stage.exits, setup.config, groups, config.optimizer, ScheduleConfig(), 1000)
    pipeline, batch, loss = one_stage(stage), _batch(workload, small.vocab_size), _plain_loss(config)

    def step(microbatches: int) -> float:
        return _seconds(lambda: tuning_step(pipeline, optimizer, [batch] * microbatches, loss, 1.0))

    def layers() -> float:
        return _seconds(lambda: pipeline.run([batch], lambda micro, teacher: None))

    step(1)  # makes the optimizer's state
    # In turns, and the fastest of each, since other load on the machine only adds time.
    rounds = [(step(1), step(2), layers()) for _ in range(REPEATS)]
    one, two, forward = map(min, zip(*rounds, strict=True))
    exits = max(two - one - forward, 0.1 * (one - forward))
    return forward, exits, max(_seconds(lambda: optimizer.step(1.0)), one - forward - exits)


def _batch(workload: Workload, vocab_size: int) -> Batch:
    rows, length = workload.micro_batch_size, workload.sequence_length
    tokens = torch.randint(vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, length, dtype=torch.bool)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, rows * length, range(rows))


def _product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device=platform.device()).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * PRODUCT**3 / min(_seconds(lambda: torch.mm(a, b)) for _ in range(REPEATS))


def _copy_rate() -> float:
    """Bytes per second from page-locked host memory to the device; on a CPU, of a copy."""
    source = torch.ones(MESSAGE, pin_memory=platform.has_accelerator())
    target = torch.empty(MESSAGE, device=platform.device())
    target.copy_(source)
    return source.nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(REPEATS))


def _link_rate(groups: Groups) -> float:
    """Bytes per second that each rank sends in an all-reduce over all ranks, counted as a ring."""
    message, ranks = torch.ones(MESSAGE, device=platform.device()), groups.world.size()
    dist.all_reduce(message, group=groups.world)
    seconds = min(_seconds(lambda: dist.all_reduce(message, group=groups.world)) for _ in range(REPEATS))
    return 2 * (ranks - 1) / ranks * message.nbytes / seconds


def _seconds(work: Callable[[], Any]) -> float:
    platform.synchronize()
    began = time.perf_counter()
    work()
    platform.synchronize()
    return time.perf_counter() - began
