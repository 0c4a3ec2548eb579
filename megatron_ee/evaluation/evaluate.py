"""Measures a model's exits on a corpus, for ``evaluate``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ee import platform
from megatron_ee.checkpoint.adapter import Adapter, check_hash, find_exits
from megatron_ee.checkpoint.digest import hash_backbone
from megatron_ee.checkpoint.loading import fill_stage
from megatron_ee.checkpoint.packing import packed_slots
from megatron_ee.checkpoint.saved_model import SavedModel, choose_dtype, open_model, quantise_layers, say_limits
from megatron_ee.config.check import check_ranks, check_residency
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import Quantise, Residency, ValidationConfig, Weights
from megatron_ee.data.checks import check_tokenizer
from megatron_ee.data.indexed import open_corpus
from megatron_ee.data.loader import ValidationWindows, validation_windows
from megatron_ee.data.prompts import held_out_prompts
from megatron_ee.data.tokenizer_files import eos_token_ids
from megatron_ee.errors import ConfigError, common_error
from megatron_ee.evaluation.quality import measure
from megatron_ee.evaluation.report import report_dict
from megatron_ee.evaluation.speed import (
    PROMPT_TOKENS,
    PROMPTS,
    TOKENS,
    ModeSpeed,
    good_threshold,
    measure_speed,
)
from megatron_ee.exits.stage import Stage, build_stage
from megatron_ee.inference.released import exits_digest
from megatron_ee.model.quality import Quality
from megatron_ee.model.setup import build_setup
from megatron_ee.model.streaming import check_host_memory
from megatron_ee.parallel.agreement import each_own
from megatron_ee.parallel.groups import (
    Groups,
    gather_objects,
    joined_processes,
    launched_rank,
    model_groups,
    world_size,
)
from megatron_ee.parallel.layout import Layout, even_layout
from megatron_ee.parallel.watchdog import SILENCE_SECONDS, watch_ranks
from megatron_ee.tuning.schedule import Pipeline

DEFAULT_SEQUENCE_LENGTH = 2048


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model's exits, and the inputs of the evaluation.

    Attributes:
        quality: quality of the exits.
        exits: the exits, in the same order.
        model: the model's directory.
        adapter: the exits' directory, if any.
        sequence_length: tokens per window.
        speed: of each mode; empty if it was not measured.
        digests: ``model_sha256`` and ``adapter_sha256``, as of ``released_digests``.
    """

    quality: Quality
    exits: tuple[ExitSpec, ...]
    model: str
    adapter: str | None
    sequence_length: int
    speed: tuple[ModeSpeed, ...] = ()
    digests: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs of the evaluation."""
        what = {"model": self.model, "adapter": self.adapter, "sequence_length": self.sequence_length}
        return {**what, **self.digests}

    def to_dict(self) -> dict[str, Any]:
        """``final_loss``, ``exits`` and the rest of ``report_dict``, and the inputs of the evaluation."""
        return {**self.inputs, **report_dict(self.quality, self.exits)}


def evaluate(
    *,
    model: str | Path,
    adapter: str | Path | None,
    data: str | Path,
    sequence_length: int | None = None,
    sequences: int = 256,
    batch_size: int = 1,
    dtype: str = "auto",
    thresholds: Sequence[float] | None = None,
    tensor: int = 1,
    pipeline: int = 1,
    residency: Residency = "device",
    verify: bool = True,
    speed: bool = False,
    gate_threshold: float | None = None,
    weights: Weights = "packed",
    quantise: Quantise = "none",
) -> Evaluation:
    """Measure the final exit, and the exits of ``adapter``, on a corpus. Every rank calls this and gets the result.

    Args:
        model: Hugging Face directory or parallel checkpoint.
        adapter: the exits; None uses those in the model's directory, or measures only the final exit.
        data: prefix of a corpus.
        sequence_length: tokens per window; default 2048, or the model's number of positions if that is lower.
        sequences: maximum number of windows; 0 for all.
        batch_size: windows per pass.
        dtype: dtype of the model; ``auto`` for the checkpoint's.
        thresholds: thresholds of the sweep, empty for none; None for those of validation in ``tune``.
        tensor: tensor-parallel size.
        pipeline: number of pipeline stages. The other ranks are used for data parallelism.
        residency: where the layers' weights are, see ``ModelConfig``.
        verify: check checksums, if the files have any.
        speed: measure the speed of each mode too, with the lowest threshold that agrees often enough.
        gate_threshold: for it, the threshold of policy ``gate``; None leaves this policy out.
        weights: how a quantised model's weights are held.
        quantise: quantise the layers of a plain model as they are loaded.

    Raises:
        ConfigError: the sequence is longer than the model's positions, the ranks do not fit the model, or there are no
            exits whose speed could be measured.
        CheckpointError: the model or the adapter is invalid, or the adapter is for another model.
        DataError: the corpus is invalid.
    """
    with joined_processes() as control:
        gather = partial(gather_objects, group=control)
        each_own(gather, lambda: check_residency(residency, pipeline, "--residency"))
        subject = each_own(
            gather,
            lambda: _open_subject(model, adapter, data, sequence_length, sequences, tensor, pipeline, verify, quantise),
        )
        if speed:
            _check_exits(subject)
        saved = subject.model
        dtype = choose_dtype(dtype, saved, "--dtype")
        say_limits(saved)
        with model_groups(control, tensor, pipeline) as groups, _watched(groups):
            setup = build_setup(
                saved.architecture,
                platform.DTYPES[dtype],
                groups,
                slots=packed_slots(saved, weights),
                residency=residency,
            )
            check_host_memory(setup, saved.architecture.num_layers, "--residency")
            _check_adapter(subject, groups)  # hashes the backbone, which takes minutes for a large one
            digests = groups.from_first(lambda: _digests(subject))
            layout = even_layout(saved.architecture.num_layers, pipeline, [spec.layer for spec in subject.exits])
            stage = build_stage(setup, layout, subject.exits, final_exit=True)
            groups.together(lambda: fill_stage(stage, saved, subject.adapter))
            quality = measure(
                Pipeline(stage, layout, subject.exits),
                subject.windows,
                ValidationConfig().thresholds if thresholds is None else thresholds,
                batch_size=batch_size,
            )
            speeds = _speed(stage, layout, subject, quality, gate_threshold) if speed else ()
    where = None if subject.adapter is None else str(subject.adapter.path)
    return Evaluation(quality, subject.exits, str(model), where, subject.windows.sequence_length, speeds, digests)


@dataclass(frozen=True)
class _Subject:
    """The inputs of an evaluation, opened and checked, except for the backbone's hash. No weights are loaded yet."""

    model: SavedModel
    adapter: Adapter | None
    windows: ValidationWindows

    @property
    def exits(self) -> tuple[ExitSpec, ...]:
        return self.adapter.exits if self.adapter is not None else ()


def _open_subject(
    model: str | Path,
    adapter: str | Path | None,
    data: str | Path,
    sequence_length: int | None,
    sequences: int,
    tensor: int,
    pipeline: int,
    verify: bool,
    quantise: Quantise,
) -> _Subject:
    saved = quantise_layers(open_model(model, verify=verify), quantise, "--quantise")
    arch = saved.architecture
    check_ranks(arch, tensor, pipeline, world_size())
    length = sequence_length or min(DEFAULT_SEQUENCE_LENGTH, arch.max_positions)
    if length > arch.max_positions:
        raise ConfigError(f"--sequence-length: {length} is more than the model's {arch.max_positions} positions")
    corpus = open_corpus(data)
    if launched_rank() == 0:  # only on one rank, because a corpus without a description is read completely
        corpus.check_vocabulary(arch.vocab_size)
        for line in check_tokenizer([("--data", corpus)], saved.path):
            print(line, file=sys.stderr, flush=True)
    windows = validation_windows([corpus], length, sequences)
    return _Subject(saved, find_exits(saved, adapter, verify=verify), windows)


def _check_exits(subject: _Subject) -> None:
    if not subject.exits:
        raise common_error("--speed: there are no exits to compare with full mode; give their adapter with --adapter")


def _speed(
    stage: Stage, layout: Layout, subject: _Subject, quality: Quality, gate_threshold: float | None
) -> tuple[ModeSpeed, ...]:
    """Speed after the beginnings of some documents; empty, with a notice, if all documents are too short."""
    arch, ranges, groups = subject.model.architecture, subject.windows.ranges, stage.setup.groups
    prompts = held_out_prompts(ranges, PROMPTS, PROMPT_TOKENS, arch.max_generated_positions - TOKENS)
    if not prompts:
        if groups.is_main:
            print("--speed: no document of the corpus is short enough for a prompt", file=sys.stderr, flush=True)
        return ()
    ends = {corpus.metadata.eos_id for corpus in subject.windows.corpora if corpus.metadata is not None}
    eos = groups.from_first(lambda: frozenset(ends.union(eos_token_ids(subject.model.path))))
    threshold = good_threshold(quality.sweep)
    return measure_speed(stage, layout, subject.exits, prompts, eos, threshold, gate_threshold)


def _watched(groups: Groups) -> contextlib.AbstractContextManager[None]:
    return watch_ranks(groups.rank, groups.world.size(), SILENCE_SECONDS, lambda: f"stage {groups.pipeline.rank()}")


def _digests(subject: _Subject) -> dict[str, str | None]:
    adapter = subject.adapter
    return {
        "model_sha256": hash_backbone(subject.model.stored_weights),
        "adapter_sha256": None if adapter is None else exits_digest(adapter),
    }


def _check_adapter(subject: _Subject, groups: Groups) -> None:
    """Refuse exits of another backbone. The first rank hashes the backbone."""
    opened, model = subject.adapter, subject.model
    if opened is not None:
        groups.together(
            lambda: check_hash(opened, model, lambda: hash_backbone(model.stored_weights)) if groups.is_main else None
        )
