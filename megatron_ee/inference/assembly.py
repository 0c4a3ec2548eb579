"""From the loaded stages of a model to an engine, on one process or on the first of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from megatron_ee import platform
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import UserError
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.compiled import CompiledStage
from megatron_ee.inference.engine import Engine, make_sequence
from megatron_ee.inference.memory import Budget, stage_memory
from megatron_ee.inference.messages import Mail, share
from megatron_ee.inference.passes import StageMap, StageWorker
from megatron_ee.inference.prefixes import Prefixes
from megatron_ee.inference.remote import DriverScheduler, RemoteChannel, RemoteStage, follow, serve_stage
from megatron_ee.inference.requests import MAX_DRAFT
from megatron_ee.inference.scheduler import PASS_TOKENS, Scheduler
from megatron_ee.inference.speculation import Acceptance, Costs, Drafter
from megatron_ee.inference.stage_runner import StageRunner
from megatron_ee.parallel.groups import Groups, host_group
from megatron_ee.parallel.layout import Layout, even_layout
from megatron_ee.parallel.transfer import connect

SLACK = MAX_DRAFT + 1
"""Positions before a sliding window that are kept: those that a rejected draft brings back into it."""
MEMORY_SHARE = 0.5
"""Of the memory that is free once the model is loaded: for keys and values, unless said otherwise."""
MAX_ROWS = 16


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
    neighbours = RemoteChannel(mail, groups.pipeline, arch.hidden_size, arch.vocab_size, setup.dtype)
    runner = StageRunner(stage, SLACK, PASS_TOKENS, neighbours, compiled_stage)
    if index > 0:
        serve_stage(runner, mail)
        mail.finish()
        yield None
        return
    others = [RemoteStage(mail, number) for number in range(1, groups.pipeline.size())]
    scheduler = _scheduler(stage, layout, specs, [runner, *others], total, max_rows, prefix_rows)
    if peers.size() > 1:
        scheduler.times = lambda seconds: float(share([seconds], peers)[0])
    if peers.rank() > 0:
        follow(scheduler, partial(make_sequence, scheduler), peers)
        _stop(others, mail)
        yield None
        return
    leader = DriverScheduler(scheduler, peers) if peers.size() > 1 else scheduler
    engine = _engine(leader, stage, specs, tokenizer, eos, off)
    in_step = True
    try:
        yield engine
    except UserError:  # of a request: no rank is in the middle of anything
        raise
    except BaseException:
        in_step = False  # the others cannot be told any more: the watchdog ends them
        raise
    finally:
        if in_step:
            engine.close()
            if isinstance(leader, DriverScheduler):
                leader.stop()
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
        max_positions=arch.max_positions,
        tokenizer=tokenizer,
        eos=eos,
        off=off,
    )


def _scheduler(
    stage: Stage,
    layout: Layout,
    specs: Sequence[ExitSpec],
    links: list[StageWorker],
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
    places = StageMap(
        ends=(*(place.layers[-1] for place in layout.stages[:-1]), arch.num_layers + 1),
        layer_exits=frozenset(spec.layer for spec in specs if spec.body == "layer"),
    )
    budget = Budget(memory, kept, SLACK, PASS_TOKENS)
    acceptance = {spec.layer: Acceptance() for spec in specs}
    drafter = Drafter(Costs(head_layers(arch, specs)), acceptance)
    prefixes = Prefixes(prefix_rows, min((window for window in arch.windows if window is not None), default=None))
    return Scheduler(links, places, budget, max_rows, drafter, prefixes)


def head_layers(architecture: Architecture, specs: Sequence[ExitSpec]) -> dict[int, float]:
    """How many layers each head is worth by its weights, body included, by place."""
    arch = architecture
    attention = (2 * arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim * arch.hidden_size
    mlp, head = 3 * arch.ffn_size * arch.hidden_size, arch.vocab_size * arch.hidden_size
    bodies = {"embedding": 0, "norm": 0, "mlp": mlp, "layer": attention + mlp}
    layer = attention + mlp
    return {spec.layer: (bodies[spec.body] + head) / layer for spec in specs} | {arch.num_layers + 1: head / layer}


def free_memory(groups: Groups) -> int:
    """What this process can take for itself; every rank calls this."""
    name = platform.memory_name()
    return platform.free_memory(groups.gather(name).count(name))
