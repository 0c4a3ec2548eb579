"""The files of a legacy Megatron checkpoint, one per rank, each with its part of the model.

They are ``mp_rank_TT/model_optim_rng.pt``, or ``mp_rank_TT_PPP/...`` with pipeline stages. A stage numbers its layers
from 0. With a virtual pipeline, a stage holds several models ``model0``, ``model1`` and so on. The layers are in the
order: ``model0`` of every stage, then ``model1`` of every stage.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.errors import CheckpointError, DamagedError, shown, storage_errors
from megatron_ee.importers.megatron.guarded import Inert
from megatron_ee.importers.megatron.legacy_args import Args
from megatron_ee.importers.megatron.torch_file import TorchFile

FILE = "model_optim_rng.pt"
VERSION = 3.0
"""Version of the row order of fused q, k and v, since 2021. Earlier Megatron-LM wrote none or a lower version."""
_RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?")
_NESTED = 4  # maximum number of levels of a state dict


@dataclass(frozen=True)
class StageFiles:
    """One model of one pipeline stage, in the files of its tensor-parallel ranks.

    Attributes:
        files: one per tensor-parallel rank.
        values: per tensor-parallel rank, the tensors as the file describes them, by key (levels joined by dots).
        layers: number of layers in the model.
        first: number of layers before it.
    """

    files: tuple[TorchFile, ...]
    values: tuple[dict[str, Any], ...]
    layers: int
    first: int


@dataclass(frozen=True)
class RankFiles:
    """All files of a checkpoint.

    Attributes:
        stages: in the order of their layers.
        tensor: tensor-parallel size.
        args: arguments of the run; empty if the files have none.
        iteration: number of completed steps.
    """

    stages: tuple[StageFiles, ...]
    tensor: int
    args: Args
    iteration: int


def read_ranks(directory: Path, *, verify: bool) -> RankFiles:
    """Read the descriptions of all files of one iteration.

    Args:
        directory: contains ``mp_rank_*``.
        verify: verify the checksums of tensors when they are first read.

    Raises:
        CheckpointError: a rank is missing, or its keys differ from other ranks' keys; the message names the file.
    """
    grid = [[TorchFile(path, verify=verify) for path in stage] for stage in _paths(directory)]
    first = grid[0][0]
    content = _content(first)
    args = Args(str(first.path), _attributes(content.get("args")))
    iteration = content.get("iteration", 0)
    if type(iteration) is not int or iteration < 0:
        raise DamagedError(f"{first.path}: iteration {shown(iteration)} is not a number of steps")
    _check_sizes(args, len(grid[0]), len(grid))
    models = [[_models(file) for file in stage] for stage in grid]  # by stage, rank and virtual stage
    count = len(models[0][0])
    for file, found in zip(_flat(grid), _flat(models), strict=True):
        if _content(file).get("iteration", 0) != iteration:
            other = shown(_content(file).get("iteration"))
            raise CheckpointError(f"{file.path}: is of iteration {other}, but {first.path} of {iteration}")
        if len(found) != count:
            raise CheckpointError(f"{file.path}: holds {len(found)} models, but {first.path} {count}")
    stages: list[StageFiles] = []
    for virtual in range(count):
        for files, ranks in zip(grid, models, strict=True):
            before = stages[-1].first + stages[-1].layers if stages else 0
            stages.append(_stage(files, [rank[virtual] for rank in ranks], before))
    return RankFiles(tuple(stages), len(grid[0]), args, iteration)


def _flat(grid: list[list[Any]]) -> Iterator[Any]:
    for row in grid:
        yield from row


def _paths(directory: Path) -> list[list[Path]]:
    """Every rank's file, by pipeline and then tensor rank."""
    found: dict[tuple[int, int | None], Path] = {}
    with storage_errors(directory, "list"):
        entries = sorted(path for path in directory.iterdir() if path.name.startswith("mp_rank_"))
    for path in entries:
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise CheckpointError(f"{path}: is not mp_rank_TT or mp_rank_TT_PPP; expert parallelism is not supported")
        found[int(match[1]), int(match[2]) if match[2] else None] = path
    tensor = 1 + max(rank for rank, _ in found)
    pipelined = {stage is not None for _, stage in found}
    if len(pipelined) > 1:
        raise CheckpointError(f"{directory}: has mp_rank_* both with and without a pipeline rank; keep one of the two")
    stages: list[int | None] = list(range(1 + max(stage or 0 for _, stage in found))) if True in pipelined else [None]
    for stage in stages:
        for rank in range(tensor):
            name = f"mp_rank_{rank:02}" + ("" if stage is None else f"_{stage:03}")
            expected = found.get((rank, stage), directory / name) / FILE
            if not expected.is_file():
                raise CheckpointError(f"{expected}: is missing; the checkpoint is not complete")
    return [[found[rank, stage] / FILE for rank in range(tensor)] for stage in stages]


def _content(file: TorchFile) -> dict[str, Any]:
    content = file.content
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.path}: holds no Megatron checkpoint but {shown(content)}")
    version = content.get("checkpoint_version", 0)
    if version != VERSION:
        raise CheckpointError(
            f"{file.path}: checkpoint_version is {shown(version)}; only {VERSION} is read, which newer releases of "
            "Megatron-LM save it as"
        )
    return content


def _attributes(args: Any) -> Mapping[str, Any]:
    """The attributes of a ``Namespace``, which was read as ``Inert``."""
    state = args.state if isinstance(args, Inert) else args
    return {key: value for key, value in state.items() if isinstance(key, str)} if isinstance(state, dict) else {}


def _check_sizes(args: Args, tensor: int, pipeline: int) -> None:
    for name, found in (("tensor_model_parallel_size", tensor), ("pipeline_model_parallel_size", pipeline)):
        stated = args.get(name, found, int)
        if stated != found:
            raise CheckpointError(
                f"{args.where}: {name} is {stated}, but there are mp_rank_* for {found}; if exits were tuned with "
                "only the first stages loaded, copy the other stages' files from the checkpoint that was tuned"
            )


def _models(file: TorchFile) -> list[dict[str, Any]]:
    content = _content(file)
    virtual = itertools.takewhile(content.__contains__, (f"model{number}" for number in itertools.count()))
    names = ["model"] if "model" in content else list(virtual)
    if not names:
        raise CheckpointError(f"{file.path}: holds no model, only {shown(list(content))}")
    return [dict(_flatten(content[name], "", file, _NESTED)) for name in names]


def _flatten(value: Any, prefix: str, file: TorchFile, levels: int) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or levels == 0:
        raise CheckpointError(f"{file.path}: {shown(prefix or 'model')} is not a state dict")
    for key, item in value.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{file.path}: {shown(prefix + '*')}: key {shown(key)} is not a name")
        if isinstance(item, dict):
            yield from _flatten(item, f"{prefix}{key}.", file, levels - 1)
        else:
            yield f"{prefix}{key}", item


def _stage(files: list[TorchFile], values: list[dict[str, Any]], first: int) -> StageFiles:
    for file, rank in zip(files[1:], values[1:], strict=True):
        for key in sorted(rank.keys() ^ values[0].keys()):
            has, lacks = (file, files[0]) if key in rank else (files[0], file)
            raise CheckpointError(f"{lacks.path}: key {shown(key)} is missing, which {has.path} has")
    numbers = {int(match[1]) for key in values[0] if (match := re.search(r"\.layers\.(\d{1,6})\.", key))}
    if numbers != set(range(len(numbers))):
        missing = min(set(range(len(numbers))) - numbers)
        raise CheckpointError(f"{files[0].path}: layer {missing} of this stage, 'layers.{missing}.*', is missing")
    return StageFiles(tuple(files), tuple(values), len(numbers), first)
