"""Explained answers of policy ``gate``, and of an exit after the last layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.evaluation.explain import Explanation, explain
from megatron_ee.evaluation.explain_page import explanation_page
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.policy import GatePolicy, ThresholdPolicy
from megatron_ee.inference.requests import Request

SPECS = [ExitSpec(1, gate=True), ExitSpec(3, "layer", "low_rank", rank=4, gate=True), ExitSpec(4, "norm", gate=True)]


@pytest.fixture(scope="module")
def stage(byte_model: Path, load_stage: Callable[..., Stage]) -> Stage:
    stage = load_stage(byte_model, SPECS)
    generator = torch.Generator().manual_seed(1)
    for exit_ in stage.exits:
        assert exit_.gate is not None
        exit_.gate.place(0.3 * torch.randn(len(exit_.gate.weight) + 1, generator=generator))
        with torch.no_grad():
            exit_.body.norm.weight *= 1 + 0.3 * exit_.spec.layer
    return stage


def explained(stage: Stage, model: Path, policy: Any) -> Explanation:
    tokenizer = load_tokenizer(model)
    engine = make_engine(stage, tokenizer=tokenizer)
    request = Request(prompt="Once upon", mode="threshold", policy=policy, max_tokens=40)
    [[one]] = explain(engine, tokenizer, [request], engine.generate([request]))
    return one


def test_the_gate_decides_and_is_shown(stage: Stage, byte_model: Path) -> None:
    one = explained(stage, byte_model, GatePolicy(threshold=0.6, thresholds={3: 0.7}))
    emitted = set()
    for token in one.tokens:
        [emitter] = [each for each in token.exits if each.emitted]
        emitted.add((emitter.layer, emitter.final))
        assert emitter.layer == token.token.layer
        for each in token.exits[:-1]:
            assert each.gate is not None and each.leaves == (each.gate >= (0.7 if each.layer == 3 else 0.6))
            assert not each.asked or each.emitted == each.leaves
        assert token.exits[-1].gate is None
        expected = emitter.confidence if emitter.final else emitter.gate
        assert token.token.confidence == pytest.approx(expected, abs=1e-4)
    assert emitted >= {(1, False), (4, True)} and len(emitted) > 2, "too little happens"
    source = explanation_page([("Once upon", one)])
    assert "leaves at gate" in source and "<small>gate 0." in source and "before the head runs" in source


@pytest.mark.parametrize("threshold", [0.005, 0.03])
def test_an_exit_after_the_last_layer_is_not_taken_for_the_final_one(
    threshold: float, stage: Stage, byte_model: Path
) -> None:
    policy = ThresholdPolicy(threshold=1.5, thresholds={4: threshold}, min_full=3, backoff=1)
    one = explained(stage, byte_model, policy)
    for index, token in enumerate(one.tokens):
        last, final = token.exits[2:]
        assert (last.layer, last.final, final.layer, final.final) == (4, False, 4, True)
        assert last.emitted == (bool(last.asked) and bool(last.leaves)) and final.emitted != last.emitted
        emitter = last if last.emitted else final
        assert emitter.agrees and token.token.confidence == pytest.approx(emitter.probability, abs=1e-4)
        assert last.emitted is False or index >= 3
    assert any(token.exits[2].emitted for token in one.tokens)
