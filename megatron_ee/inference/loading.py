"""From a released model and its exits to an engine, on one process or over many."""

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
"""Positions before a sliding window that are kept. A rejected draft brings them back into it, and so does a copy of a
sequence's complete positions: its first layers are ahead of those by the deferred tokens."""
MEMORY_SHARE = 0.5
"""Of the memory that is free once the model is loaded: for keys and values, unless said otherwise."""
MAX_ROWS = 16


@dataclass(frozen=True)
class Released:
    """A model, its exits and its tokenizer, opened and checked; nothing of it takes much memory yet."""

    path: Path
    model: SavedModel
    adapter: Adapter | None
    tokenizer: Tokenizer
    eos: frozenset[int]

    @property
    def exits(self) -> tuple[ExitSpec, ...]:
        """The adapter's."""
        return () if self.adapter is None else self.adapter.exits


def open_released(model: str | Path, adapter: str | Path | None = None, *, verify: bool = True) -> Released:
    """Check a model, its tokenizer and its exits.

    Args:
        model: Hugging Face directory or parallel checkpoint, with its tokenizer.
        adapter: exits; None takes those that lie with the model, or none.
        verify: check what is read against its checksums, where there are any.

    Raises:
        CheckpointError: the model or the adapter cannot be used, or they do not belong together.
        DataError: the tokenizer cannot be used.
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
    """Load a model over all processes of the run and give an engine for it.

    Every rank calls this. The first one gets the engine; the others do their part of its work meanwhile, and get None
    when it is closed.

    Args:
        released: from ``open_released``.
        dtype: of the model, its keys and values; ``auto`` is the checkpoint's own.
        tensor: ranks that share each layer.
        pipeline: stages.
        memory: bytes for keys and values on each rank; default: half of what is free there then.
        max_rows: sequences in work at a time; others wait.
        candidates: token ids that drafts are chosen from, such as ``data.indexed.frequent_tokens`` finds: a drafting
            exit then computes no other logits (FR-Spec, arXiv 2502.14856); the full model still emits any token. None
            for all.
        compiled: compile the layers between exits; a sequence that runs alone is then faster.
        prefix_rows: ended sequences whose keys and values are kept, at most, while the memory is not needed: a request
            that begins with the same tokens, as the next message of a chat does, begins with a copy of them.
            It then rounds as the other did, where passes of other sizes round differently.
        exits: layers of the exits to have; None for all. The others take no memory and no time, and requests that ask
            them are refused. A ``layer`` exit keeps keys and values of its own, which every token fills, also in full
            mode: without it full mode is the faster.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: an argument that is impossible.
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
    """Refuse what cannot run, before anything is loaded.

    Raises:
        ConfigError: naming the option.
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
    """This rank's layers of the backbone, and those of ``exits`` after them; see ``open_engine``."""
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
    """Tokens that end generation: any that the model's configuration, its generation configuration or its tokenizer
    names. The tokenizer's one ends a turn of the chat template where the others end a document, or the reverse.

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
    """The engine on the first rank, for stages that are loaded; see ``open_engine``."""
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
    except (UserError, ValidationError):  # of a request: no rank is in the middle of anything
        raise
    except BaseException:
        in_step = False  # no message reaches the others any more: the watchdog ends them
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
    """An engine for a stage that holds the whole model, on one process; arguments as for ``open_engine``."""
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
    """How many layers each head costs, by its weights and its body's, by depth."""
    arch, head = architecture, architecture.vocab_size * architecture.hidden_size
    shapes = [shape for parts in parameter_parts(arch).values() for shape in parts]
    layer = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    exits = {spec.layer: (body_weights(spec, arch) + head) / layer for spec in specs}
    return {**exits, arch.num_layers + 1: head / layer}


def free_memory(groups: Groups) -> int:
    """Bytes that this process can take for itself; every rank calls this."""
    name = platform.memory_name()
    return platform.free_memory(groups.gather(name).count(name))
