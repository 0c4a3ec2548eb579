"""Validation over several stages: as on one, also with the final exit on a stage of its own or not loaded at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.commands.main import main
from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.indexed import open_corpus
from megatron_ee.data.loader import validation_windows
from megatron_ee.errors import ConfigError
from megatron_ee.evaluation.evaluate import evaluate
from megatron_ee.evaluation.final_exit import final_exit
from megatron_ee.evaluation.quality import measure
from megatron_ee.exits.stage import build_stage
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import joined_processes, model_groups
from megatron_ee.testing.project import Project
from megatron_ee.testing.ranks import run_ranks
from megatron_ee.testing.tuning import Case, prepare
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.schedule import Pipeline

SPECS = (ExitSpec(1), ExitSpec(2, "layer", "shared"), ExitSpec(3, "norm", "low_rank", rank=4))
THRESHOLDS = (0.01, 0.02, 0.1)
ONE = (((1, 4), (1, 2, 3)),)
HALVES = (((1, 2), (1, 2)), ((3, 4), (3,)))
MIXED = (((1, 3), ()), ((4, 4), ()), (None, (1, 2, 3)))


def scored(path: Path, corpus: Path, cache: Path, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """On one rank: quality with the final exit at the end of the pipeline, and with its cached outcome."""
    os.environ["MEGATRON_EE_CACHE"] = str(cache)
    with joined_processes() as control, model_groups(control, case.tensor, len(case.stages)) as groups:
        windows = validation_windows([open_corpus(corpus)], 32, 23)
        pipeline, _ = prepare(path, case, groups)
        model = open_model(path)
        setup = build_setup(model.architecture, pipeline.stage.setup.dtype, groups, sequence_parallel=case.sequence)
        whole = build_stage(setup, case.layout, case.specs, final_exit=True)
        whole.load_state_dict(pipeline.stage.state_dict(), strict=False)
        load_backbone(whole, model)
        there = measure(Pipeline(whole, case.layout, case.specs), windows, THRESHOLDS, batch_size=2)
        full = FullModel(setup, model, Interrupt())
        final = final_exit(full, "digest", windows, 2, 512)
        again = final_exit(full, "digest", windows, 2, 512)
        assert final.loss.equal(again.loss) and final.top1.equal(again.top1)
        cached = measure(pipeline, windows, THRESHOLDS, final=final, batch_size=2)
        return there.to_dict(), cached.to_dict()


def close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            close(*pair)
    elif expected is None or isinstance(expected, str):
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    "world_size, stages, tensor, sequence",
    [
        (2, HALVES, 1, False),
        pytest.param(3, MIXED, 1, False, marks=pytest.mark.slow),
        pytest.param(4, HALVES, 2, True, marks=pytest.mark.slow),
        pytest.param(4, HALVES, 1, False, marks=pytest.mark.slow),
    ],
    ids=["pipeline", "apart", "tensor", "data"],
)
def test_quality_is_that_of_one_process(
    world_size: int, stages: Any, tensor: int, sequence: bool, project: Project, tmp_path: Path
) -> None:
    arguments = (project.model, project.held_out, tmp_path)
    (alone,) = run_ranks(1, scored, *arguments, Case("", "", SPECS, ONE))
    close(alone[1], alone[0])
    for there, cached in run_ranks(world_size, scored, *arguments, Case("", "", SPECS, stages, tensor, sequence)):
        close(there, alone[0])
        close(cached, alone[0])


def evaluated(path: Path, adapter: Path, corpus: Path, cache: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    """On one rank: what ``evaluate`` finds."""
    os.environ["MEGATRON_EE_CACHE"] = str(cache)
    options: dict[str, Any] = {"sequence_length": 32, "sequences": 7, "dtype": "float32", "thresholds": THRESHOLDS}
    found = evaluate(
        model=path, adapter=adapter, data=corpus, batch_size=2, tensor=tensor, pipeline=pipeline, speed=True, **options
    )
    assert [each.mode for each in found.speed] == ["full", "threshold", "speculative"]
    assert all(each.speedup > 0 for each in found.speed) and found.speed[2].agreement == 1.0
    return {**found.to_dict(), "equal": [each.agreement for each in found.speed]}


@pytest.mark.slow
def test_evaluate_over_ranks_equals_one_process(project: Project, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    exits = json.dumps([{"layer": s.layer, "body": s.body, "head": s.head, "rank": s.rank} for s in SPECS])
    paths = ("--input", str(project.model), "--output", str(adapter))
    assert main(["convert", *paths, "--to", "adapter", "--exits", exits]) == 0
    arguments = (project.model, adapter, project.held_out, tmp_path / "cache")
    (alone,) = run_ranks(1, evaluated, *arguments, 1, 1)
    assert [exit_["layer"] for exit_ in alone["exits"]] == [1, 2, 3] and len(alone["sweep"]) == len(THRESHOLDS)
    for world_size, tensor, pipeline in ((2, 1, 2), (4, 2, 1)):  # the second with two data-parallel copies
        for found in run_ranks(world_size, evaluated, *arguments, tensor, pipeline):
            close(found, alone)


@pytest.mark.parametrize(
    "options, word",
    [({"tensor": 3}, "--tensor: 3"), ({"pipeline": 5}, "--pipeline: 5"), ({"tensor": 2}, "the 1 running")],
)
def test_evaluate_refuses_ranks_that_do_not_fit(options: dict[str, int], word: str, project: Project) -> None:
    with pytest.raises(ConfigError, match=word):
        evaluate(model=project.model, adapter=None, data=project.held_out, **options)
