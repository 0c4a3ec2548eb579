"""Acceptance measured along continuations equals that of the engine in speculative mode, in every layout."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import LossConfig
from megatron_ee.data.loader import Batch
from megatron_ee.evaluation.acceptance import ContinuationWindows, measure_acceptance
from megatron_ee.evaluation.continuations import Continuation, continuations
from megatron_ee.exits.stage import build_stage
from megatron_ee.inference.loading import engine_on_ranks
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.requests import Draft, Request
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import Groups, joined_processes, model_groups
from megatron_ee.testing.project import Project
from megatron_ee.testing.ranks import run_ranks
from megatron_ee.testing.tuning import Case, prepare
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.step import tuning_step

SPECS = (ExitSpec(1), ExitSpec(2, "layer", "shared"), ExitSpec(3, "norm", "low_rank", rank=4), ExitSpec(4))
PROMPTS = [(5, 17, 99, 42, 3, 77, 120), (9, 8, 7), (30, 31, 32, 33, 34, 35), (64,), (2, 4, 6, 8, 10), (90, 80)]
LIMIT, DRAFT, EOS = 24, 3, 1
ONE = (((1, 4), (1, 2, 3, 4)),)
HALVES = (((1, 2), (1, 2)), ((3, 4), (3, 4)))
Counts = tuple[int, int, int, int]


def measured(path: Path, cache: Path, case: Case) -> dict[str, Any]:
    """On one rank: continuations and acceptance after a few steps, and what the engine counts with the same exits.

    Once without an end of text, and once with a token as one that the full model writes.
    """
    os.environ["MEGATRON_EE_CACHE"] = str(cache)
    with joined_processes() as control, model_groups(control, case.tensor, len(case.stages)) as groups:
        model = open_model(path)
        setup = build_setup(model.architecture, torch.float32, groups, sequence_parallel=case.sequence)
        full = FullModel(setup, model, Interrupt())
        paths = {"length": continuations(full, "digest", PROMPTS, LIMIT, frozenset((EOS,)))}
        end = paths["length"][0].tokens[LIMIT // 2]
        paths["eos"] = continuations(full, "digest", PROMPTS, LIMIT, frozenset((EOS, end)))
        gc.disable()
        stage, full = weakref.ref(full.stage), FullModel(setup, model, Interrupt())
        assert stage() is None, "the layers are freed at once"
        gc.enable()
        assert continuations(full, "digest", PROMPTS, LIMIT, frozenset((EOS, end))) == paths["eos"]
        assert "stage" not in vars(full), "the cache needs no layers"
        assert setup.config.sequence_parallel == case.sequence
        pipeline, optimizer = prepare(path, case, groups)
        for _ in range(4):
            tuning_step(pipeline, optimizer, own_batches(paths["length"], groups), LossConfig(), 1.0)
        whole = build_stage(
            build_setup(model.architecture, torch.float32, groups), case.layout, case.specs, final_exit=True
        )
        whole.load_state_dict(pipeline.stage.state_dict(), strict=False)
        load_backbone(whole, model)
        found: dict[str, Any] = {}
        for name, each in paths.items():
            counted = measure_acceptance(pipeline, each, DRAFT, batch_tokens=70)
            own = {layer: (a.rounds, a.tokens, a.proposed, a.accepted) for layer, a in counted.items()}
            eos = frozenset((EOS, end)) if name == "eos" else frozenset((EOS,))
            engines = groups.gather(decoded(Pipeline(whole, case.layout, case.specs), eos))
            found[name] = ([(path.prompt, path.tokens) for path in each], own, next(e for e in engines if e))
        return found


def own_batches(paths: tuple[Continuation, ...], groups: Groups) -> list[Batch]:
    """The continuations as training data, of which the exits learn a part in a few steps."""
    windows = ContinuationWindows(paths, 4)
    return list(windows.batches(1, groups.data.rank(), groups.data.size()))


def decoded(pipeline: Pipeline, eos: frozenset[int]) -> dict[int, Counts]:
    """What the engine counts in speculative mode with each exit."""
    counts: dict[int, Counts] = {}
    with engine_on_ranks(
        pipeline.stage, pipeline.layout, pipeline.specs, EngineOptions(kv_memory=1 << 24), eos=eos
    ) as engine:
        if engine is None:
            return {}
        for layer in (1, 2, 3):
            draft = Draft(exit=layer, length=DRAFT)
            requests = [Request(prompt=p, mode="speculative", draft=draft, max_tokens=LIMIT) for p in PROMPTS]
            done = [completion.statistics for (completion,) in engine.generate(requests)]
            columns = [sum(each[name] for each in done) for name in ("rounds", "tokens", "proposed", "accepted")]
            counts[layer] = (columns[0], columns[1] - len(PROMPTS), columns[2], columns[3])
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "world_size, stages, tensor, sequence",
    [
        (1, ONE, 1, False),
        (2, HALVES, 1, False),
        (2, ONE, 1, False),
        (4, HALVES, 2, True),
    ],
    ids=["one", "pipeline", "data", "tensor"],
)
def test_acceptance_is_that_of_the_engine(
    world_size: int, stages: Any, tensor: int, sequence: bool, project: Project, tmp_path: Path
) -> None:
    case = Case("", "", SPECS, stages, tensor, sequence)
    results = run_ranks(world_size, measured, project.model, tmp_path, case)
    for result in results:
        assert result == results[0]
    paths, counted, engine = results[0]["length"]
    assert all(len(tokens) == LIMIT or tokens[-1] == EOS for _, tokens in paths)
    assert counted == engine
    assert all(0 < accepted < proposed for _, _, proposed, accepted in counted.values()), "neither all nor nothing"
    ended, counted, engine = results[0]["eos"]
    assert sum(len(tokens) for _, tokens in ended) < sum(len(tokens) for _, tokens in paths)
    for layer, (rounds, tokens, proposed, accepted) in counted.items():
        # The engine also judges proposals after the end of text, which it then does not emit.
        assert (rounds, tokens) == engine[layer][:2] and proposed <= engine[layer][2] and accepted <= engine[layer][3]
