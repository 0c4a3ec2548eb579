"""Loads a released model and builds its engine, on one or more ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError

from megatron_ee import platform
from megatron_ee.checkpoint.loading import fill_stage
from megatron_ee.checkpoint.packing import packed_slots
from megatron_ee.checkpoint.saved_model import choose_dtype, say_limits
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import Residency, Weights
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import UserError
from megatron_ee.exits.registry import body_of
from megatron_ee.exits.stage import Stage
from megatron_ee.exits.tensors import body_weights
from megatron_ee.families.weights import parameter_parts
from megatron_ee.inference.compiled import compile_stage
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.kv_cache_manager import KVBudget, KVCacheManager, PrefixCache, stage_kv_memory
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.passes import StageMap, StageWorker
from megatron_ee.inference.policy import MOST_DEFERRED
from megatron_ee.inference.released import Released
from megatron_ee.inference.remote import (
    DriverScheduler,
    Mail,
    RemoteChannel,
    RemoteStage,
    broadcast,
    follow_driver,
    serve_stage,
)
from megatron_ee.inference.requests import MAX_DRAFT
from megatron_ee.inference.scheduler import Scheduler
from megatron_ee.inference.speculation import Acceptance, Costs, Drafter
from megatron_ee.inference.stage_runner import StageRunner
from megatron_ee.model.setup import build_setup
from megatron_ee.model.streaming import check_host_memory
from megatron_ee.parallel.groups import Groups, joined_processes, model_groups
from megatron_ee.parallel.layout import Layout, even_layout
from megatron_ee.parallel.tiles import PASS_TOKENS
from megatron_ee.parallel.transfer import connect
from megatron_ee.parallel.watchdog import SILENCE_SECONDS, watch_ranks

DEFAULTS = EngineOptions()
SLACK = max(MAX_DRAFT, MOST_DEFERRED) + 1
"""Positions kept before a sliding window. They are needed after a rejected draft, and for a copy of the positions that
all layers have run: the first layers may be ahead by the deferred tokens."""
MEMORY_SHARE = 0.5
"""Default share of the free memory, after loading the model, for the KV cache."""


@contextmanager
def open_engine(
    released: Released,
    options: EngineOptions = DEFAULTS,
    *,
    prepare: Callable[[], None] = lambda: None,
    on_failure: Callable[[str], None] = lambda line: None,
    **fields: Any,
) -> Iterator[Engine | None]:
    """Load a model on all ranks and yield its engine.

    Every rank calls this. The first rank gets the engine. The other ranks work for it until it is closed, and then get
    None.

    Args:
        released: from ``open_released``.
        options: how the model is loaded, and how its engine runs.
        prepare: called on the first rank before the model is loaded. What it raises is raised on all ranks.
        on_failure: see ``watch_ranks``.
        fields: single options by name, in place of those in ``options``.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: an option does not fit the model or the machine.
        ValidationError: ``fields`` has an unknown or invalid option.
    """
    if fields:
        options = EngineOptions(**(dict(options) | fields))
    options.check(released)
    dtype = choose_dtype(options.dtype, released.model, "--dtype")
    say_limits(released.model)
    loaded = [spec for spec in released.exits if options.exits is None or spec.layer in options.exits]
    off = [spec.layer for spec in released.exits if spec not in loaded]
    with (
        joined_processes() as control,
        model_groups(control, options.tensor, options.pipeline) as groups,
        watch_ranks(
            groups.rank, groups.world.size(), SILENCE_SECONDS, lambda: f"stage {groups.pipeline.rank()}", on_failure
        ),
    ):
        groups.together(lambda: prepare() if groups.is_main else None)
        layout = even_layout(released.model.architecture.num_layers, options.pipeline)
        stage = load_stage(
            released, loaded, layout, dtype, groups, options.candidates, options.weights, options.residency
        )
        with engine_on_ranks(
            stage, layout, loaded, options, tokenizer=released.tokenizer, eos=released.eos, off=off
        ) as engine:
            yield engine


def load_stage(
    released: Released,
    exits: Sequence[ExitSpec],
    layout: Layout,
    dtype: str,
    groups: Groups,
    candidates: Sequence[int] | None = None,
    weights: Weights = "packed",
    residency: Residency = "device",
) -> Stage:
    """Load this rank's layers of the backbone and the exits on them.

    ``candidates``, ``weights`` and ``residency`` as in ``EngineOptions``.
    """
    index, arch = groups.pipeline.rank(), released.model.architecture
    layers, slots = layout.stages[index].layers, packed_slots(released.model, weights)
    setup = build_setup(arch, platform.DTYPES[dtype], groups, slots=slots, residency=residency)
    check_host_memory(setup, len(layers), "--residency")
    specs = [spec for spec in exits if spec.layer in layers]
    stage = Stage(setup, layers, specs, embedding=index == 0, final_exit=index == layout.last_layered)
    groups.together(lambda: fill_stage(stage, released.model, released.adapter))
    if candidates is not None:
        ids = torch.tensor(sorted(set(candidates)), device=platform.device())
        for exit_ in stage.exits:
            exit_.head.restrict(ids)
    return stage


@contextmanager
def engine_on_ranks(
    stage: Stage,
    layout: Layout,
    specs: Sequence[ExitSpec],
    options: EngineOptions = DEFAULTS,
    *,
    tokenizer: Tokenizer | None = None,
    eos: frozenset[int] = frozenset(),
    off: Sequence[int] = (),
) -> Iterator[Engine | None]:
    """Yield the engine of loaded stages on the first rank. Every rank calls this, as ``open_engine``.

    Args:
        stage: this rank's stage.
        layout: the layers of all stages.
        specs: the exits of all stages.
        options: those that concern loading are ignored.
        tokenizer: see ``Engine``.
        eos: see ``Engine``.
        off: see ``Engine``.
    """
    groups = stage.setup.groups
    if groups.world.size() == 1:
        engine = make_engine(stage, options, tokenizer=tokenizer, eos=eos, off=off)
        try:
            yield engine
        finally:
            engine.close()
        return
    arch, index = stage.setup.architecture, groups.pipeline.rank()
    compiled, memory = compile_stage(stage) if options.compile else None, _kv_memory(groups, options)
    mail, peers = Mail(groups.host_pipeline), groups.host_tensor
    for source in range(groups.pipeline.size() - 1):
        connect(groups.pipeline, source, source + 1)
    channel = RemoteChannel(mail, groups.pipeline, arch.hidden_size, arch.vocab_size, stage.setup.dtype)
    runner = StageRunner(stage, SLACK, PASS_TOKENS, channel, compiled)
    if index > 0:
        serve_stage(runner, mail)
        mail.finish()
        yield None
        return
    others = [RemoteStage(mail, number) for number in range(1, groups.pipeline.size())]
    scheduler = _scheduler(stage, layout, specs, [runner, *others], memory, options)
    if peers.size() > 1:
        scheduler.broadcast_seconds = lambda seconds: float(broadcast([seconds], peers)[0])
    if peers.rank() > 0:
        follow_driver(scheduler, peers)
        _stop(others, mail)
        yield None
        return
    driver = DriverScheduler(scheduler, peers) if peers.size() > 1 else scheduler
    engine = Engine(driver, arch, specs, tokenizer=tokenizer, eos=eos, off=off)
    in_sync = True
    try:
        yield engine
    except (UserError, ValidationError):  # an invalid request; all ranks are idle
        raise
    except BaseException:
        in_sync = False  # the other ranks may wait for messages that will not come; the watchdog ends them
        raise
    finally:
        if in_sync:
            engine.close()
            if isinstance(driver, DriverScheduler):
                driver.stop()
            _stop(others, mail)


def _stop(others: Sequence[RemoteStage], mail: Mail) -> None:
    for other in others:
        other.stop()
    mail.finish()


def make_engine(
    stage: Stage,
    options: EngineOptions = DEFAULTS,
    *,
    tokenizer: Tokenizer | None = None,
    eos: frozenset[int] = frozenset(),
    off: Sequence[int] = (),
) -> Engine:
    """Build an engine in one process, for a stage with the whole model; arguments as for ``engine_on_ranks``."""
    arch, specs = stage.setup.architecture, [exit_.spec for exit_ in stage.exits]
    compiled = compile_stage(stage) if options.compile else None
    runner = StageRunner(stage, SLACK, PASS_TOKENS, compiled=compiled)
    memory = _kv_memory(stage.setup.groups, options)
    scheduler = _scheduler(stage, even_layout(arch.num_layers, 1), specs, [runner], memory, options)
    return Engine(scheduler, arch, specs, tokenizer=tokenizer, eos=eos, off=off)


def _scheduler(
    stage: Stage,
    layout: Layout,
    specs: Sequence[ExitSpec],
    workers: list[StageWorker],
    memory: int,
    options: EngineOptions,
) -> Scheduler:
    arch, setup = stage.setup.architecture, stage.setup
    memories = [
        stage_kv_memory(
            arch,
            place.layers,
            [spec for spec in specs if spec.layer in place.layers],
            setup.groups.tensor.size(),
            setup.dtype.itemsize,
        )
        for place in layout.stages
    ]
    stage_map = StageMap(
        ends=(*(place.layers[-1] for place in layout.stages[:-1]), arch.num_layers + 1),
        layer_exits=frozenset(spec.layer for spec in specs if body_of(spec).windows(arch)),
    )
    drafter = Drafter(Costs(head_layers(arch, specs)), {spec.layer: Acceptance() for spec in specs})
    window = min((window for window in arch.windows if window is not None), default=None)
    return Scheduler(
        workers,
        stage_map,
        KVCacheManager(
            workers,
            KVBudget(memory, memories, SLACK, PASS_TOKENS),
            PrefixCache(options.prefix_cache_seqs, window),
        ),
        options.max_num_seqs,
        drafter,
    )


def head_layers(architecture: Architecture, specs: Sequence[ExitSpec]) -> dict[int, float]:
    """By depth, the cost of the head (with the exit's body) in layers, from the number of weights."""
    arch, head = architecture, architecture.vocab_size * architecture.hidden_size
    shapes = [shape for parts in parameter_parts(arch).values() for shape in parts]
    layer = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    exits = {spec.layer: (body_weights(spec, arch) + head) / layer for spec in specs}
    return {**exits, arch.num_layers + 1: head / layer}


def _kv_memory(groups: Groups, options: EngineOptions) -> int:
    """Bytes that every rank can give to its KV cache. Every rank calls this."""
    given = options.kv_memory
    return min(groups.gather(int(MEMORY_SHARE * free_memory(groups)) if given is None else given))


def free_memory(groups: Groups) -> int:
    """Bytes of free memory that this process may use. Every rank calls this."""
    name = platform.memory_name()
    return platform.free_memory(groups.gather(name).count(name))
