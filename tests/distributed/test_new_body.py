"""A body that the package does not know is planned, tuned, saved, loaded at another layout and decoded with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_ee.checkpoint.adapter import find_exits
from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.loading import fill_stage
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.body import Body, ExitPart, GraphBytes, LayerBytes, norm_part
from megatron_ee.exits.norm import norm_graph_bytes
from megatron_ee.exits.registry import BODIES
from megatron_ee.exits.stage import Stage
from megatron_ee.families.family import Source
from megatron_ee.inference.loading import engine_on_ranks
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Draft, Request
from megatron_ee.model.linear import RMSNorm
from megatron_ee.model.setup import ModelSetup, build_setup
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.layout import even_layout
from megatron_ee.planning.plan import make_plan
from megatron_ee.planning.workload import Workload
from megatron_ee.testing.ranks import run_ranks
from megatron_ee.testing.tuning import Case, prepare, random_batches
from megatron_ee.tuning.step import tuning_step

SPECS = (ExitSpec(2, "linear"), ExitSpec(3, "linear", "shared"))
PROMPT = [5, 17, 99, 42, 3, 77, 120]


class LinearBody(Body):
    """``N(h_k + P h_k)``; every rank has all of P."""

    saved = frozenset({"map", "norm"})
    not_plain = "their layers have no linear map of their own"

    def __init__(self, setup: ModelSetup, layer: int) -> None:
        super().__init__(setup, layer)
        size = setup.architecture.hidden_size
        self.map = nn.Linear(size, size, bias=False, dtype=setup.dtype)
        self.norm = RMSNorm(setup, size)

    @classmethod
    def parts(cls, architecture: Architecture, layer: int) -> Iterator[ExitPart]:
        size = architecture.hidden_size
        yield ExitPart("map.weight", Source((f"exits.{layer}.map.weight",), "whole"), ((size, size),), None)
        yield norm_part(architecture, layer)

    @classmethod
    def flops(cls, architecture: Architecture, tokens: int) -> int:
        return 4 * tokens * architecture.hidden_size**2

    @classmethod
    def graph_bytes(cls, sizes: LayerBytes) -> GraphBytes:
        norm = norm_graph_bytes(sizes)
        return GraphBytes(norm.kept + sizes.hidden, norm.backward + sizes.hidden)

    def rest(self, x: Tensor) -> Tensor:
        return self.norm(x + self.map(x))


BODIES["linear"] = LinearBody


def decode(model: str, adapter: str, tensor: int) -> Any:
    """On one rank: what the adapter's exits emit, draft and decide, as token ids and layers; None on other ranks."""
    torch.set_num_threads(1)
    with process_groups(tensor) as groups:
        saved = open_model(model)
        exits = find_exits(saved, adapter)
        assert exits is not None
        layout = even_layout(saved.architecture.num_layers, 1)
        stage = Stage(build_setup(saved.architecture, torch.float32, groups), range(1, 5), exits.exits, final_exit=True)
        fill_stage(stage, saved, exits)
        with engine_on_ranks(stage, layout, exits.exits) as engine:
            if engine is None:
                return None
            completions = engine.generate(
                [
                    Request(prompt=PROMPT, max_tokens=12),
                    Request(prompt=PROMPT, max_tokens=12, mode="speculative", draft=Draft(exit=2, length=3)),
                    Request(prompt=PROMPT, max_tokens=12, mode="threshold", policy=ThresholdPolicy(threshold=0.02)),
                ]
            )
            return [[(token.id, token.layer) for token in each.tokens] for [each] in completions]


@pytest.fixture
def tuned(saved_model: Any, groups: Any, tmp_path: Path) -> tuple[str, str]:
    """A model, and an adapter of two such exits after a few steps."""
    model, _ = saved_model("llama2")
    case = Case("", "llama2", SPECS, (((1, 3), (2, 3)),))
    pipeline, optimizer = prepare(model, case, groups)
    stage = pipeline.stage
    arch, batches = stage.setup.architecture, random_batches(stage.setup.architecture.vocab_size, 0, 0, 1, 2)
    first = [exit_.body.map.weight.detach().clone() for exit_ in stage.exits]
    losses = [[exit_.loss for exit_ in tuning_step(pipeline, optimizer, batches, case.loss, 1.0).exits] for _ in "123"]
    assert all(after < before for before, after in zip(losses[0], losses[-1], strict=True))
    assert not any(torch.equal(exit_.body.map.weight, old) for exit_, old in zip(stage.exits, first, strict=True))

    (planned,) = make_plan(case.layout, arch, SPECS, Workload(4, sequence_length=16)).stages
    assert planned.trained_parameters == sum(p.numel() for p in stage.parameters() if p.requires_grad)
    about = {"base_model": str(model), "backbone_sha256": "0" * 64, "steps": 3}
    save_adapter(tmp_path / "adapter", stage.exits, SPECS, groups, **about)
    return str(model), str(tmp_path / "adapter")


def test_a_new_body_needs_no_change_elsewhere(tuned: tuple[str, str]) -> None:
    alone, (shared, _) = run_ranks(1, decode, *tuned, 1), run_ranks(2, decode, *tuned, 2)
    assert alone == [shared]
    full, speculative, early = shared
    assert [token for token, _ in full] == [token for token, _ in speculative]
    assert {layer for _, layer in early} & {2, 3}
