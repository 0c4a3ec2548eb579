"""Fitted exits of every layout give the features that one process's give, on other tokens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_ee.checkpoint.adapter import open_adapter
from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.loading import load_exits
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import DataConfig, FitConfig, ModelConfig, ParallelConfig, RunConfig, TuningConfig
from megatron_ee.exits.fit import RIDGES
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import joined_processes, model_groups
from megatron_ee.testing.ranks import run_ranks
from megatron_ee.testing.tuning import RandomBlend
from megatron_ee.tuning import fit as tuning_fit
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt

LENGTH = 32
CHOSEN = "llama-biases"
"""The family whose fitted exits are better than copies. For the others the last share is taken."""
WORK = {
    "llama2": (
        ExitSpec(1, init="fit"),
        ExitSpec(2, "layer", "shared", init="fit"),
        ExitSpec(3, "norm", "shared", init="fit"),
        ExitSpec(4, init="random"),
    ),
    CHOSEN: (ExitSpec(2, "mlp", "shared", init="fit"), ExitSpec(3, "mlp", "low_rank", init="fit")),
    "gemma2": (ExitSpec(1, "norm", "shared", init="fit"), ExitSpec(3, "mlp", "shared", init="fit")),
}


@dataclass(frozen=True)
class Place:
    """``tensor`` and ``pipeline`` sizes, sequence parallelism, sequences per microbatch: the rest is data-parallel."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    micro: int = 1


PLACES = {
    1: [Place(micro=4)],
    2: [Place(2), Place(2, sequence=True, micro=2), Place(1, 2), Place(micro=2)],
    4: [Place(2, 2, sequence=True), Place(1, 2, micro=2), Place(2, 1)],
    8: [Place(2, 2), Place(2, 2, sequence=True)],
}


def fit_all(models: dict[str, Path], places: Sequence[Place], output: Path) -> None:
    """On one rank: every family in every place; the exits are saved as ``output/<number of the place>/<family>``."""
    with joined_processes() as control:
        for number, place in enumerate(places):
            with model_groups(control, place.tensor, place.pipeline) as groups:
                for family, path in models.items():
                    model, specs = open_model(path), WORK[family]
                    setup = build_setup(model.architecture, torch.float32, groups, sequence_parallel=place.sequence)
                    config = RunConfig(
                        ModelConfig(str(path)),
                        [],
                        DataConfig([], sequence_length=LENGTH),
                        ParallelConfig(),
                        tuning=TuningConfig(global_batch_size=4, micro_batch_size=place.micro),
                        fit=FitConfig(tokens=800),
                    )
                    blend: Any = RandomBlend(LENGTH)
                    last = mock.patch.object(tuning_fit, "choose", _prefer_last_share)
                    with contextlib.nullcontext() if family == CHOSEN else last:
                        exits = tuning_fit.fit_exits(config, FullModel(setup, model, Interrupt()), specs, blend)
                    where = output / str(number) / family
                    save_adapter(where, exits, specs, groups, base_model="", backbone_sha256="0" * 64, steps=0)


def _prefer_last_share(figures: Sequence[tuple[float, float]]) -> tuple[int, bool]:
    """In place of the lowest loss: the first ridge, then the last share."""
    return 1 if len(figures) <= 1 + len(RIDGES) else len(figures) - 1, True


@pytest.fixture(scope="module")
def models(saved_model: Any) -> dict[str, Path]:
    return {family: saved_model(family)[0] for family in WORK}


@pytest.fixture(scope="module")
def alone(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output: Path = tmp_path_factory.mktemp("alone")
    run_ranks(1, fit_all, models, PLACES[1], output)
    return output / "0"


def features(load_stage: Any, model: Path, specs: Sequence[ExitSpec], adapter: Path | None) -> list[Tensor]:
    """Of each exit of an adapter, or of a copy, on tokens that it was not fitted on."""
    stage = load_stage(model, [dataclasses.replace(spec, init="copy") for spec in specs])
    if adapter is not None:
        load_exits(stage.exits, open_adapter(adapter), open_model(model))
    tokens = torch.randint(0, 131, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    positions = stage.backbone.positions(LENGTH)
    _, taps = stage.run_layers(stage.backbone.embed(tokens), positions)
    with torch.no_grad():
        return [exit_.features(taps[exit_.spec.layer], positions) for exit_ in stage.exits]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_layouts_fit_what_one_process_does(
    world_size: int, models: dict[str, Path], alone: Path, load_stage: Any, tmp_path: Path
) -> None:
    run_ranks(world_size, fit_all, models, PLACES[world_size], tmp_path)
    for family, specs in WORK.items():
        expected = features(load_stage, models[family], specs, alone / family)
        for number in range(len(PLACES[world_size])):
            found = features(load_stage, models[family], specs, tmp_path / str(number) / family)
            for spec, mine, theirs in zip(specs, found, expected, strict=True):
                difference, largest = (mine - theirs).abs().max(), theirs.abs().max()
                assert difference <= 1e-4 * largest, (PLACES[world_size][number], family, spec)


def test_fitted_exits_differ_from_copies(models: dict[str, Path], alone: Path, load_stage: Any) -> None:
    for family, specs in WORK.items():
        copies = features(load_stage, models[family], specs, None)
        fitted = features(load_stage, models[family], specs, alone / family)
        for spec, mine, theirs in zip(specs, fitted, copies, strict=True):
            # Random exits differ too.
            assert (mine - theirs).abs().max() > 0.05 * theirs.abs().max(), (family, spec)


def raise_a_ridge(path: Path) -> None:
    """On one of two tensor-parallel ranks: too few tokens for the features, and no ridge."""
    with joined_processes() as control, model_groups(control, 2, 1) as groups:
        model = open_model(path)
        setup = build_setup(model.architecture, torch.float32, groups)
        stage, _ = FullModel(setup, model, Interrupt()).with_exits([ExitSpec(2, init="fit")])
        (exit_,) = stage.exits
        initialise_exit(exit_, model, 1)
        positions = stage.backbone.positions(LENGTH)
        tokens = torch.arange(LENGTH)[None]
        last, taps = stage.run_layers(stage.backbone.embed(tokens), positions, to_end=True)
        fit = exit_.body.fit(setup)
        assert fit is not None
        with torch.no_grad():
            fit.add(exit_.attention_half(taps[2], positions), last, torch.ones(LENGTH))
        fit.reduce()
        solutions = fit.solve([0.0, 0.1])
        for parts in (part for solution in solutions for part in (solution.values, solution.smallest)):
            assert parts and all(value.isfinite().all() for value in parts.values())
        ridges = [solution.ridge for solution in solutions]
        assert 0 < ridges[0] < 1e-3 and ridges[1] == 0.1 and groups.gather(ridges) == [ridges, ridges]


def test_tensor_parallel_ranks_raise_a_ridge_together(models: dict[str, Path]) -> None:
    """One of them solves for both."""
    run_ranks(2, raise_a_ridge, models["llama2"])
