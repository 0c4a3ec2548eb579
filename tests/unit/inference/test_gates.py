"""Policy ``gate`` and gated drafts: the gate decides before the head runs, and only heads that ran are counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.policy import GatePolicy, ThresholdPolicy, policy_from_json
from megatron_ee.inference.requests import Completion, Draft, Request
from megatron_ee.inference.sampling import Sampling
from megatron_ee.inference.speculation import Drafter, Plan

LAYERS = 4
TOKENS = 24
EXITS = [ExitSpec(1, gate=True), ExitSpec(2, "layer", "shared", gate=True), ExitSpec(3, "norm", "shared", gate=True)]
PROMPTS = [(5, 17, 99, 42, 3, 77, 120), (9,), (8, 8, 3)]


@pytest.fixture(scope="module")
def stage(exit_stage: Callable[[str, Sequence[ExitSpec]], Stage]) -> Stage:
    """With gates whose probability depends on the token."""
    found = exit_stage("llama3.1", EXITS)
    generator = torch.Generator().manual_seed(1)
    for exit_ in found.exits:
        assert exit_.gate is not None
        exit_.gate.place(torch.randn(len(exit_.gate.weight) + 1, generator=generator, dtype=torch.float64) * 0.3)
    return found


@pytest.fixture
def heads(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each call of an exit's head."""
    rows: list[int] = []
    for exit_ in stage.exits:

        def counted(z: Tensor, logits: Callable[[Tensor], Tensor] = exit_.head.logits) -> Tensor:
            rows.append(len(z))
            return logits(z)

        monkeypatch.setattr(exit_.head, "logits", counted)
    return rows


def generate(stage: Stage, requests: Sequence[Request]) -> list[Completion]:
    return [found[0] for found in make_engine(stage).generate(requests)]


def gated(prompt: tuple[int, ...], policy: Any, **fields: Any) -> Request:
    return Request(prompt=prompt, mode="threshold", policy=policy, max_tokens=TOKENS, **fields)


def ids(completion: Completion) -> list[int]:
    return [token.id for token in completion.tokens]


def test_a_threshold_near_zero_lets_all_leave_at_the_first_exit(stage: Stage, heads: list[int]) -> None:
    (found,) = generate(stage, [gated(PROMPTS[0], GatePolicy(threshold=1e-9, max_deferred=4))])
    layers = [token.layer for token in found.tokens]
    assert layers[:7] == [4, 1, 1, 1, 1, 4, 1] and set(layers) == {1, LAYERS}
    (theirs,) = generate(stage, [gated(PROMPTS[0], ThresholdPolicy(threshold=1e-9, max_deferred=4))])
    assert ids(found) == ids(theirs) and found.statistics["heads_per_token"] == 1
    differs = [one.confidence != other.confidence for one, other in zip(found.tokens, theirs.tokens, strict=True)]
    assert differs == [layer == 1 for layer in layers]  # the gate's probability, and the final exit's own
    assert sum(heads) == 2 * layers.count(1)


def test_above_one_it_is_full_mode_and_no_exit_runs_its_head(stage: Stage, heads: list[int]) -> None:
    full = generate(stage, [Request(prompt=prompt, max_tokens=TOKENS) for prompt in PROMPTS])
    found = generate(stage, [gated(prompt, GatePolicy(threshold=1.5)) for prompt in PROMPTS])
    assert [ids(one) for one in found] == [ids(one) for one in full] and not heads
    assert all(one.statistics["heads_per_token"] == 1 for one in found)
    asked = generate(stage, [gated(PROMPTS[0], ThresholdPolicy(threshold=1.5, backoff=0))])[0]
    assert ids(asked) == ids(full[0]) and asked.statistics["heads_per_token"] == 1 + len(EXITS)


def test_neighbours_and_the_kind_of_request_change_nothing(stage: Stage) -> None:
    """Gates decide sequence by sequence, beside requests without them."""
    drawn = Sampling(temperature=0.8, seed=3)
    requests = [gated(prompt, GatePolicy(threshold=0.6, thresholds={3: 0.5})) for prompt in PROMPTS]
    requests += [gated(prompt, ThresholdPolicy(threshold=0.05)) for prompt in PROMPTS]
    requests += [gated(PROMPTS[0], GatePolicy(threshold=0.6), sampling=drawn, logprobs=2)]
    together = generate(stage, requests)
    left: set[int] = set()
    for one, request in zip(together, requests, strict=True):
        (alone,) = generate(stage, [request])
        assert ids(one) == ids(alone) and [t.layer for t in one.tokens] == [t.layer for t in alone.tokens]
        if isinstance(request.policy, GatePolicy):
            left |= {token.layer for token in one.tokens}
            assert one.statistics["heads_per_token"] == 1
            for token in one.tokens:
                if token.layer < LAYERS:
                    assert token.confidence >= request.policy.thresholds.get(token.layer, 0.6) - 1e-6
    assert left >= {1, LAYERS} and len(left) > 2
    assert all(token.logprobs is not None for token in together[-1].tokens)


def test_gates_end_drafts(stage: Stage, heads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The output stays the full model's; drafting heads run only where the gate lets them."""
    full = generate(stage, [Request(prompt=prompt, max_tokens=TOKENS) for prompt in PROMPTS])
    drafted = [Request(prompt=prompt, mode="speculative", max_tokens=TOKENS) for prompt in PROMPTS]
    assert [ids(one) for one in generate(stage, drafted)] == [ids(one) for one in full]  # planned online

    monkeypatch.setattr(Drafter, "plan", lambda *_, **__: Plan(2, 4, 1.1))  # no chance is enough
    heads.clear()
    refused = generate(stage, drafted)
    assert [ids(one) for one in refused] == [ids(one) for one in full] and not heads
    assert all(one.statistics["heads_per_token"] == 1 and one.statistics["proposed"] == 0 for one in refused)
    monkeypatch.setattr(Drafter, "plan", lambda *_, **__: Plan(2, 4, 0.3))
    some = generate(stage, drafted)
    assert [ids(one) for one in some] == [ids(one) for one in full] and heads
    assert any(one.statistics["proposed"] > 0 for one in some)
    fixed = [request.model_copy(update={"draft": Draft(exit=2, length=3)}) for request in drafted]
    assert [ids(one) for one in generate(stage, fixed)] == [ids(one) for one in full]


def test_features_that_are_not_finite_end_the_request(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = stage.exits[0].gate
    assert gate is not None
    monkeypatch.setattr(gate, "forward", lambda z: torch.full((len(z),), math.nan))
    engine = make_engine(stage)
    number = engine.submit(gated(PROMPTS[0], GatePolicy()))
    events = list(engine.stream(number))
    assert events[-1].error is not None and "logits after layer 1 at position 8 are not finite" in events[-1].error


def test_an_exit_without_a_gate_is_refused(exit_stage: Any) -> None:
    engine = make_engine(exit_stage("llama3.1", [ExitSpec(1), ExitSpec(3, "norm", gate=True)]))
    with pytest.raises(ConfigError, match="policy: the exit after layer 1 has no gate; tune it with gate: true"):
        engine.submit(gated(PROMPTS[0], GatePolicy()))
    engine.submit(gated(PROMPTS[0], GatePolicy(), exits=(3,)))
    engine.close()
    engine = make_engine(exit_stage("llama3.1", [ExitSpec(1)]))
    with pytest.raises(ConfigError, match="has no gate; tune it with gate: true$"):
        engine.submit(gated(PROMPTS[0], GatePolicy()))
    engine.close()


def test_json_form() -> None:
    policy = policy_from_json({"name": "gate", "threshold": 0.8, "thresholds": {"2": 0.9}})
    assert isinstance(policy, GatePolicy) and policy.thresholds == {2: 0.9} and policy.backoff == 0
    assert policy_from_json(policy.model_dump(mode="json")) == policy
