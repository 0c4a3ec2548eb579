"""Opens a released model and its exits, and builds an engine on one or more ranks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from megatron_ee import platform
from megatron_ee.checkpoint.adapter import Adapter, check_hash, find_exits
from megatron_ee.checkpoint.digest import hash_backbone
from megatron_ee.checkpoint.loading import fill_stage
from megatron_ee.checkpoint.saved_model import SavedModel, choose_dtype, open_model, say_text_only
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.check import check_pipeline, check_tensor
from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ee.data.tokenizer_files import eos_token_ids
from megatron_ee.errors import ConfigError, UserError, shown
from megatron_ee.exits.registry import body_of
from megatron_ee.exits.stage import Stage
from megatron_ee.exits.tensors import body_weights
from megatron_ee.families.weights import parameter_parts
from megatron_ee.inference.compiled import CompiledStage, check_compiler, compile_stage
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.kv_cache_manager import KVBudget, PrefixCache, stage_memory
from megatron_ee.inference.passes import StageMap, StageWorker
from megatron_ee.inference.policy import MOST_DEFERRED
from megatron_ee.inference.remote import (
    DriverScheduler,
    Mail,
    RemoteChannel,
    RemoteStage,
    follow_driver,
    serve_stage,
    share,
)
from megatron_ee.inference.requests import MAX_DRAFT, check_ids
from megatron_ee.inference.scheduler import PASS_TOKENS, Scheduler
from megatron_ee.inference.speculation import Acceptance, Costs, Drafter
from megatron_ee.inference.stage_runner import StageRunner
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import Groups, host_group, joined_processes, model_groups, world_size
from megatron_ee.parallel.layout import Layout, even_layout
from megatron_ee.parallel.transfer import connect
from megatron_ee.parallel.watchdog import SILENCE_SECONDS, watch_ranks

SLACK = max(MAX_DRAFT, MOST_DEFERRED) + 1
"""Positions kept before a sliding window. They are needed after a rejected draft, and for a copy of the positions that
all layers have run: the first layers may be ahead by the deferred tokens."""
MEMORY_SHARE = 0.5
"""Default share of the free memory, after loading the model, for the KV cache."""
MAX_ROWS = 16
"""Default maximum number of running sequences."""


@dataclass(frozen=True)
class Released:
    """A model, its exits and its tokenizer, opened and checked. The weights are not loaded yet."""

    path: Path
    model: SavedModel
    adapter: Adapter | None
    tokenizer: Tokenizer
    eos: frozenset[int]

    @property
    def exits(self) -> tuple[ExitSpec, ...]:
        """The exits of the adapter."""
        return () if self.adapter is None else self.adapter.exits


def open_released(model: str | Path, adapter: str | Path | None = None, *, verify: bool = True) -> Released:
    """Open and check a model, its tokenizer and its exits.

    Args:
        model: Hugging Face directory or parallel checkpoint, with its tokenizer.
        adapter: directory of the exits; None for the exits in the model's directory, if any.
        verify: verify checksums of the files, if there are any.

    Raises:
        CheckpointError: the model or the adapter is invalid, or the adapter is for another model.
        DataError: the tokenizer is invalid.
    """
    released = open_model(model, verify=verify)
    opened = find_exits(released, adapter, verify=verify)
    tokenizer = load_tokenizer(model)
    if opened is not None:
        check_hash(opened, released, lambda: hash_backbone(released.weights))
    return Released(Path(model), released, opened, tokenizer, end_of_text(Path(model), tokenizer))


@contextmanager
def open_engine(
    released: Released,
    *,
    dtype: str = "auto",
    tensor: int = 1,
    pipeline: int = 1,
    memory: int | None = None,
    max_rows: int = MAX_ROWS,
    candidates: Sequence[int] | None = None,
    compiled: bool = False,
    prefix_rows: int = 0,
    exits: Collection[int] | None = None,
) -> Iterator[Engine | None]:
    """Load a model on all ranks and yield its engine.

    Every rank calls this. The first rank gets the engine. The other ranks work for it until it is closed, and then get
    None.

    Args:
        released: from ``open_released``.
        dtype: dtype of the model and the KV cache; ``auto`` for the checkpoint's.
        tensor: tensor-parallel size.
        pipeline: number of pipeline stages.
        memory: bytes of KV cache on each rank; None for half of the memory that is free after loading.
        max_rows: maximum number of running sequences; others wait.
        candidates: token ids that a drafting exit may propose, for example from ``data.indexed.frequent_tokens``. It
            then computes only their logits (FR-Spec, arXiv 2502.14856). The full model still emits any token. None for
            all.
        compiled: compile the layers between exits, which makes a sequence that runs alone faster.
        prefix_rows: maximum number of finished sequences whose KV is kept while memory permits. A request that starts
            with the same tokens, such as the next message of a chat, copies this KV. Its rounding is then that of the
            other request, which may differ from its own because passes of different sizes round differently.
        exits: layers of the exits to load; None for all. Other exits cost no memory or time, and requests that name
            them are errors. A ``layer`` exit has its own KV, which every token fills, so full mode is faster without
            it.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: an argument is invalid.
    """
    check_parallel(released.model.architecture, tensor, pipeline, world_size())
    dtype = choose_dtype(dtype, released.model, "dtype")
    say_text_only(released.model)
    if type(prefix_rows) is not int or prefix_rows < 0:
        raise ConfigError(f"prefix_rows: must be a whole number from 0 on, not {prefix_rows!r}")
    if compiled:
        check_compiler(released.model.architecture, tensor)
    there = [spec.layer for spec in released.exits]
    for layer in exits or ():
        if layer not in there:
            raise ConfigError(f"exits: there is no exit after layer {shown(layer)}; there are: {there or 'none'}")
    specs = [spec for spec in released.exits if exits is None or spec.layer in exits]
    if candidates is not None:
        check_ids("candidates", candidates, released.model.architecture.vocab_size)
        if not candidates:
            raise ConfigError("candidates: there are none; give some token ids, or None for all")
    with joined_processes() as control, model_groups(control, tensor, pipeline) as groups:
        place = f"stage {groups.pipeline.rank()}"
        with watch_ranks(groups.rank, groups.world.size(), SILENCE_SECONDS, lambda: place):
            layout = even_layout(released.model.architecture.num_layers, pipeline)
            stage = load_stage(released, specs, layout, dtype, groups, candidates)
            compiled_stage = compile_stage(stage) if compiled else None
            with engine_on_ranks(
                stage,
                layout,
                specs,
                released.tokenizer,
                released.eos,
                memory,
                max_rows,
                compiled_stage,
                prefix_rows,
                [layer for layer in there if exits is not None and layer not in exits],
            ) as engine:
                yield engine


def check_parallel(architecture: Architecture, tensor: int, pipeline: int, processes: int) -> None:
    """Check the parallel sizes, before anything is loaded.

    Raises:
        ConfigError: they do not fit the model or the number of processes; the message names the option.
    """
    if processes != tensor * pipeline:
        raise ConfigError(
            f"tensor x pipeline: {tensor} x {pipeline} needs {tensor * pipeline} processes, but there are {processes}; "
            "start as many with torchrun, or change the options"
        )
    check_pipeline(architecture.num_layers, pipeline, "pipeline")
    check_tensor(architecture, tensor, "tensor")


def load_stage(
    released: Released,
    exits: Sequence[ExitSpec],
    layout: Layout,
    dtype: str,
    groups: Groups,
    candidates: Sequence[int] | None = None,
) -> Stage:
    """Load this rank's layers of the backbone and the exits on them; arguments as for ``open_engine``."""
    index, arch = groups.pipeline.rank(), released.model.architecture
    layers = layout.stages[index].layers
    setup = build_setup(arch, platform.DTYPES[dtype], groups)
    specs = [spec for spec in exits if spec.layer in layers]
    stage = Stage(setup, layers, specs, embedding=index == 0, final_exit=index == layout.last_layered)
    groups.together(lambda: fill_stage(stage, released.model, released.adapter))
    if candidates is not None:
        ids = torch.tensor(sorted(set(candidates)), device=platform.device())
        for exit_ in stage.exits:
            exit_.head.restrict(ids)
    return stage


def end_of_text(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The end-of-text tokens of the model's configuration, its generation configuration and its tokenizer.

    All are needed: one may end a turn of the chat template and another a document.

    Raises:
        DataError: ``eos_token_id`` is not a token id or a list of them.
    """
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return frozenset((*eos_token_ids(directory), *own))


@contextmanager
def engine_on_ranks(
    stage: Stage,
    layout: Layout,
    specs: Sequence[ExitSpec],
    tokenizer: Tokenizer | None = None,
    eos: frozenset[int] = frozenset(),
    memory: int | None = None,
    max_rows: int = MAX_ROWS,
    compiled_stage: CompiledStage | None = None,
    prefix_rows: int = 0,
    off: Sequence[int] = (),
) -> Iterator[Engine | None]:
    """Yield the engine on the first rank, for loaded stages; arguments as for ``open_engine``."""
    setup, groups = stage.setup, stage.setup.groups
    arch, index = setup.architecture, groups.pipeline.rank()
    total = min(groups.gather(int(MEMORY_SHARE * free_memory(groups)) if memory is None else memory))
    if groups.world.size() == 1:
        engine = make_engine(
            stage,
            tokenizer=tokenizer,
            eos=eos,
            memory=total,
            max_rows=max_rows,
            compiled_stage=compiled_stage,
            prefix_rows=prefix_rows,
            off=off,
        )
        try:
            yield engine
        finally:
            engine.close()
        return
    mail = Mail(host_group(groups.pipeline, groups.control))
    peers = host_group(groups.tensor, groups.control)
    for source in range(groups.pipeline.size() - 1):
        connect(groups.pipeline, source, source + 1)
    channel = RemoteChannel(mail, groups.pipeline, arch.hidden_size, arch.vocab_size, setup.dtype)
    runner = StageRunner(stage, SLACK, PASS_TOKENS, channel, compiled_stage)
    if index > 0:
        serve_stage(runner, mail)
        mail.finish()
        yield None
        return
    others = [RemoteStage(mail, number) for number in range(1, groups.pipeline.size())]
    scheduler = _scheduler(stage, layout, specs, [runner, *others], total, max_rows, prefix_rows)
    if peers.size() > 1:
        scheduler.share_seconds = lambda seconds: float(share([seconds], peers)[0])
    if peers.rank() > 0:
        follow_driver(scheduler, peers)
        _stop(others, mail)
        yield None
        return
    driver = DriverScheduler(scheduler, peers) if peers.size() > 1 else scheduler
    engine = _engine(driver, stage, specs, tokenizer, eos, off)
    in_step = True
    try:
        yield engine
    except (UserError, ValidationError):  # an invalid request; all ranks are idle
        raise
    except BaseException:
        in_step = False  # the other ranks may wait for messages that will not come; the watchdog ends them
        raise
    finally:
        if in_step:
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
    *,
    tokenizer: Tokenizer | None = None,
    eos: frozenset[int] = frozenset(),
    memory: int | None = None,
    max_rows: int = MAX_ROWS,
    compiled_stage: CompiledStage | None = None,
    prefix_rows: int = 0,
    off: Sequence[int] = (),
) -> Engine:
    """Build an engine in one process, for a stage with the whole model; arguments as for ``open_engine``."""
    layout, specs = even_layout(stage.setup.architecture.num_layers, 1), [exit_.spec for exit_ in stage.exits]
    total = int(MEMORY_SHARE * free_memory(stage.setup.groups)) if memory is None else memory
    runner = StageRunner(stage, SLACK, PASS_TOKENS, compiled=compiled_stage)
    scheduler = _scheduler(stage, layout, specs, [runner], total, max_rows, prefix_rows)
    return _engine(scheduler, stage, specs, tokenizer, eos, off)


def _engine(
    scheduler: Scheduler | DriverScheduler,
    stage: Stage,
    specs: Sequence[ExitSpec],
    tokenizer: Tokenizer | None = None,
    eos: frozenset[int] = frozenset(),
    off: Sequence[int] = (),
) -> Engine:
    arch = stage.setup.architecture
    return Engine(
        scheduler,
        specs,
        num_layers=arch.num_layers,
        vocab_size=arch.vocab_size,
        max_positions=arch.max_generated_positions,
        tokenizer=tokenizer,
        eos=eos,
        off=off,
    )


def _scheduler(
    stage: Stage,
    layout: Layout,
    specs: Sequence[ExitSpec],
    stages: list[StageWorker],
    memory: int,
    max_rows: int,
    prefix_rows: int,
) -> Scheduler:
    arch, setup = stage.setup.architecture, stage.setup
    kept = [
        stage_memory(
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
    budget = KVBudget(memory, kept, SLACK, PASS_TOKENS)
    acceptance = {spec.layer: Acceptance() for spec in specs}
    drafter = Drafter(Costs(head_layers(arch, specs)), acceptance)
    prefixes = PrefixCache(prefix_rows, min((window for window in arch.windows if window is not None), default=None))
    return Scheduler(stages, stage_map, budget, max_rows, drafter, prefixes)


def head_layers(architecture: Architecture, specs: Sequence[ExitSpec]) -> dict[int, float]:
    """By depth, the cost of the head (with the exit's body) in layers, from the number of weights."""
    arch, head = architecture, architecture.vocab_size * architecture.hidden_size
    shapes = [shape for parts in parameter_parts(arch).values() for shape in parts]
    layer = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    exits = {spec.layer: (body_weights(spec, arch) + head) / layer for spec in specs}
    return {**exits, arch.num_layers + 1: head / layer}


def free_memory(groups: Groups) -> int:
    """Bytes of free memory that this process may use. Every rank calls this."""
    name = platform.memory_name()
    return platform.free_memory(groups.gather(name).count(name))
