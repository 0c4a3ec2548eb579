"""Megatron-LM's legacy checkpoints, and EE-LLM's with exits: ``iter_*/mp_rank_TT[_PPP]/model_optim_rng.pt``.

Every expected parameter of the model and its exits is looked up in the ranks' files. So missing and unknown keys are
reported by name before anything is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.derived import Rows, join_columns, join_rows
from megatron_ee.checkpoint.tensors import StoredTensor, same_values
from megatron_ee.config.architecture import Architecture
from megatron_ee.errors import CheckpointError, shown
from megatron_ee.exits.tensors import exit_parts, exit_tensors
from megatron_ee.families.family import LLAMA_LAYER, Source
from megatron_ee.families.weights import EMBEDDING, FINAL_NORM, LM_HEAD, expected_tensors
from megatron_ee.importers.megatron.legacy_args import (
    EarlyExit,
    check_agreement,
    derive_config,
    differing_settings,
    early_exits,
)
from megatron_ee.importers.megatron.legacy_names import OLD, TIED_HEAD, StageParameter, find_parameter, spell
from megatron_ee.importers.megatron.legacy_ranks import RankFiles, StageFiles, read_ranks
from megatron_ee.importers.megatron.opening import (
    TRACKER,
    ImportedModel,
    derived_model,
    given_model,
    require_trust,
    tracked_iteration,
)
from megatron_ee.model.names import blocks

Shapes = Mapping[str, tuple[int, ...]]


def open_legacy(path: Path, *, trust: bool, config: Path | None = None, verify: bool = True) -> Contents:
    """Open a legacy checkpoint of Megatron-LM or EE-LLM. Optimizer state is left out.

    Tensors are not read, except a tied embedding: the last stage's copy must equal the first stage's.

    Args:
        path: directory of one iteration, or of all iterations (the latest is then used).
        trust: allow pickles, which the format uses.
        config: the model's Hugging Face directory, or its ``config.json``. None uses the run's arguments in the files.
        verify: check the CRC-32 that ``torch.save`` wrote, once per storage.

    Raises:
        CheckpointError: ``trust`` is not given, a file or key is missing, unknown or of a wrong shape, or the model or
            its exits are not supported. The message names the file and the key.
    """
    require_trust(path, trust)
    directory = path if next(path.glob("mp_rank_*"), None) else tracked_iteration(path)
    if directory is None or next(directory.glob("mp_rank_*"), None) is None:
        raise CheckpointError(
            f"{directory or path}: there is no mp_rank_*{'' if directory else f' and no {TRACKER}'}; give a directory "
            "as Megatron-LM saves it"
        )
    ranks = read_ranks(directory, verify=verify)
    model = _model(ranks, config)
    arch = model.architecture
    exits = early_exits(ranks.args, arch)
    specs = tuple(sorted((each.spec for each in exits), key=lambda spec: spec.layer))
    found = _tensors(ranks, model, exits)
    if arch.tied:
        _check_tied_head(ranks, model, found[EMBEDDING])
    return Contents(
        source=directory,
        format=f"{'EE-LLM' if specs else 'Megatron legacy'} checkpoint",
        architecture=arch,
        backbone={name: found[name] for name in expected_tensors(arch)},
        exits=specs,
        exit_tensors={name: found[name] for spec in specs for name in exit_tensors(spec, arch)},
        assets=model.assets,
        base_model=str(directory.resolve()),
        steps=ranks.iteration,
        notes=model.notes,
    )


def _model(ranks: RankFiles, config: Path | None) -> ImportedModel:
    args = ranks.args
    if config is not None:
        model = given_model(config)
        check_agreement(args, model.architecture, model.where)
        return dataclasses.replace(model, notes=differing_settings(args, model.architecture, model.where))
    if not args.values:
        raise CheckpointError(f"{args.where}: has no args, so the model's shape is not known; give --config DIR")
    stage, embedding = ranks.stages[0], StageParameter("backbone", "embedding.weight")
    key = next((key for key in stage.values[0] if find_parameter(key, tied=True) == embedding), None)
    if key is None:
        raise CheckpointError(f"{args.where}: has no embedding; not the file of a GPT model's first stage")
    dtype = stage.files[0].tensor(stage.values[0][key], key).dtype
    return derived_model(derive_config(args, dtype), args.where)


def _tensors(ranks: RankFiles, model: ImportedModel, exits: Sequence[EarlyExit]) -> dict[str, StoredTensor]:
    """Every tensor of the backbone and of the exits, by its released or adapter name."""
    arch, size = model.architecture, ranks.tensor
    last = ranks.stages[-1]
    if last.first + last.layers != arch.num_layers:
        count = last.first + last.layers
        raise CheckpointError(f"{last.files[0].path}: is the last of {count} layers; {model.where}: {arch.num_layers}")
    if arch.num_kv_heads % size or arch.ffn_size % size:
        raise CheckpointError(
            f"{model.where}: {arch.num_kv_heads} key-value heads and {arch.ffn_size} columns of the MLP cannot be "
            f"split over {size} tensor-parallel ranks"
        )
    shapes = expected_tensors(arch)
    found: dict[str, StoredTensor] = {}
    for stage in ranks.stages:
        keys = _parameters(stage, arch.tied)
        old = any(key.startswith(OLD) for key in stage.values[0])
        for parameter, source in _backbone_parameters(stage, ranks, shapes):
            found |= _join(stage, _take(keys, parameter, stage, old), source, shapes, model, size)
        for parameter, source, own in _exit_parameters(stage, exits, arch):
            found |= _join(stage, _take(keys, parameter, stage, old), source, own, model, size)
        if keys:
            key = shown(next(iter(keys.values())))
            raise CheckpointError(f"{stage.files[0].path}: key {key} does not belong to the model of {model.where}")
    return found


def _check_tied_head(ranks: RankFiles, model: ImportedModel, embedding: StoredTensor) -> None:
    """Refuse a tied head that differs from the embedding."""
    last = ranks.stages[-1]
    source, shapes = Source((LM_HEAD,), "vocabulary"), {LM_HEAD: embedding.shape}
    for key in last.values[0]:
        if find_parameter(key, tied=True) == TIED_HEAD:
            head = _join(last, key, source, shapes, model, ranks.tensor)[LM_HEAD]
            if not same_values(embedding, head):
                raise CheckpointError(
                    f"{last.files[0].path}: key {shown(key)} differs from the embedding that {model.where} ties it to; "
                    "if this head is the model's, give a config.json with tie_word_embeddings false by --config"
                )


def _parameters(stage: StageFiles, tied: bool) -> dict[StageParameter, str]:
    """Map the parameters of a stage to their keys."""
    keys: dict[StageParameter, str] = {}
    for key in stage.values[0]:
        parameter = find_parameter(key, tied)
        if parameter is None:
            raise CheckpointError(f"{stage.files[0].path}: key {shown(key)} is not known")
        if parameter.scope == "known":
            continue
        if parameter in keys:
            raise CheckpointError(f"{stage.files[0].path}: keys {shown(keys[parameter])} and {shown(key)} are the same")
        keys[parameter] = key
    return keys


def _take(keys: dict[StageParameter, str], parameter: StageParameter, stage: StageFiles, old: bool) -> str:
    if parameter not in keys:
        raise CheckpointError(f"{stage.files[0].path}: key {spell(parameter, old)!r} is missing")
    return keys.pop(parameter)


def _backbone_parameters(
    stage: StageFiles, ranks: RankFiles, shapes: Shapes
) -> Iterator[tuple[StageParameter, Source]]:
    """The backbone's parameters that a stage must hold."""
    if stage is ranks.stages[0]:
        yield StageParameter("backbone", "embedding.weight"), Source((EMBEDDING,), "vocabulary")
    for index in range(stage.layers):
        for parameter, inner in LLAMA_LAYER.items():
            prefix = f"model.layers.{stage.first + index}"
            source = Source(tuple(f"{prefix}.{name}" for name in inner.names), inner.kind)
            if source.names[0] in shapes:
                yield StageParameter("backbone", parameter, index), source
    if stage is ranks.stages[-1]:
        yield StageParameter("backbone", "final_norm.weight"), Source((FINAL_NORM,), "whole")
        if LM_HEAD in shapes:
            yield StageParameter("backbone", "head.weight"), Source((LM_HEAD,), "vocabulary")


def _exit_parameters(
    stage: StageFiles, exits: Sequence[EarlyExit], arch: Architecture
) -> Iterator[tuple[StageParameter, Source, Shapes]]:
    """The exits' parameters that a stage must hold. Heads are numbered within the stage."""
    inside = [each for each in exits if stage.first < each.layer <= stage.first + stage.layers]
    for number, each in enumerate(inside):
        for part in exit_parts(each.spec, arch):
            parameter = StageParameter("exit", part.parameter, each.layer - 1 - stage.first)
            if part.parameter == "head.matrix.weight":
                parameter = StageParameter("exit head", "head.weight", number)
            yield parameter, part.saved, dict(zip(part.saved.names, part.shapes, strict=True))


def _join(
    stage: StageFiles, key: str, source: Source, shapes: Shapes, model: ImportedModel, size: int
) -> dict[str, StoredTensor]:
    """Join the ranks' tensors under ``key`` and split them into released tensors."""
    arch = model.architecture
    parts = [file.tensor(values[key], key) for file, values in zip(stage.files, stage.values, strict=True)]
    for file, part in zip(stage.files, parts, strict=True):
        where = f"{file.path}: key {shown(key)}"
        if part.dtype != parts[0].dtype or not part.dtype.is_floating_point:
            raise CheckpointError(f"{where} is of {part.dtype}, but {parts[0].dtype} in {stage.files[0].path}")
        expected, padded = _rank_shape(source, shapes, size), source.kind == "vocabulary"
        if padded and len(part.shape) == len(expected) and part.shape[0] * size >= arch.vocab_size:
            expected = (parts[0].shape[0], *expected[1:])
        if part.shape != expected:
            raise CheckpointError(
                f"{where} has shape {list(part.shape)}, but {model.where} makes it {list(expected)}"
                f"{' or longer' if padded else ''} on each of {size} ranks"
            )
    made = f"{key}, {source.kind} of {size} ranks, {arch.num_heads} heads in {arch.num_kv_heads} groups"
    if source.kind == "whole":
        return {source.names[0]: dataclasses.replace(parts[0], made=made)}
    if source.kind == "columns":
        return {source.names[0]: join_columns(parts, made)}
    runs: dict[str, list[Rows]] = {name: [] for name in source.names}
    for rank, part in enumerate(parts):
        # A meta tensor, used only to map its rows to rows of the released tensors.
        held = torch.empty(part.shape, dtype=part.dtype, device="meta")
        for block in blocks(held, source, arch, rank, size):
            first = block.tensor.storage_offset() // math.prod(part.shape[1:])
            runs[block.name].append(Rows(part, first, len(block.tensor)))
    return {name: join_rows(found, f"{name} of {made}") for name, found in runs.items()}


def _rank_shape(source: Source, shapes: Shapes, size: int) -> tuple[int, ...]:
    """Shape of each rank's tensor. For the vocabulary it has the smallest possible number of rows."""
    first = shapes[source.names[0]]
    if source.kind == "whole":
        return first
    if source.kind == "columns":
        return first[0], first[1] // size
    return -(-sum(shapes[name][0] for name in source.names) // size), *first[1:]
