"""From a released model and its exits to stages that are loaded, and an engine for them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ee import platform
from megatron_ee.checkpoint.adapter import Adapter, check_hash, find_exits
from megatron_ee.checkpoint.digest import hash_backbone
from megatron_ee.checkpoint.loading import fill_stage
from megatron_ee.checkpoint.saved_model import SavedModel, choose_dtype, open_model
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.check import check_pipeline, check_tensor
from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ee.errors import ConfigError, shown
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.assembly import MAX_ROWS, engine_on_ranks
from megatron_ee.inference.compiled import check_compiler, compile_stage
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.prompts import check_ids, end_of_text
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import Groups, joined_processes, model_groups, world_size
from megatron_ee.parallel.layout import Layout, even_layout
from megatron_ee.parallel.watchdog import SILENCE_SECONDS, watch_ranks


@dataclass(frozen=True)
class Released:
    """What an engine is made of, opened and checked; nothing of it takes much memory yet."""

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
        max_rows: outputs in work at a time; others wait.
        candidates: token ids that drafts are chosen from, such as ``data.indexed.frequent_tokens`` finds: a drafting
            exit then computes no other logits (FR-Spec, arXiv 2502.14856); the full model still emits any token. None
            for all.
        compiled: compile the layers between exits, and the exits; a row that runs alone then waits less for each token.
        prefix_rows: rows whose keys and values are kept when they have ended, at most, while the memory is not needed:
            a request that begins with the same tokens, as the next message of a chat does, begins with a copy of them.
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
    if type(prefix_rows) is not int or prefix_rows < 0:
        raise ConfigError(f"prefix_rows: must be a whole number from 0 on, not {prefix_rows!r}")
    if compiled:
        check_compiler(tensor)
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
            exit_.restrict(ids)
    return stage
