"""Outputs of heads, on logits made by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_ee import platform
from megatron_ee.inference.heads import HeadInput, HeadOutput, LogProbs, head_outputs
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.sampling import Sampling, uniform
from megatron_ee.testing.one_row import draw, penalised, probabilities, verify

LOGITS = torch.tensor([[0.6, 0.3, 0.1]]).log()
DRAWN = Sampling(temperature=0.7, seed=5)


def one(logits: Tensor, head_input: HeadInput, draft: list[Tensor] | None = None) -> HeadOutput:
    [found] = head_outputs(logits, [head_input], [[] if draft is None else draft])
    return found


def entropy_of(*shares: float) -> float:
    return -sum(share * math.log(share) for share in shares)


@pytest.mark.parametrize(
    "measure, sure",
    [
        ("probability", 0.6),
        ("margin", 0.3),
        ("entropy", 1 - entropy_of(0.6, 0.3, 0.1) / math.log(3)),
    ],
)
def test_a_token_leaves_at_its_confidence_and_above(measure: Any, sure: float) -> None:
    for threshold, leaves in ((sure - 1e-3, True), (sure + 1e-3, False), (2.0, False)):
        found = one(LOGITS, HeadInput("leave", 9, policy=ThresholdPolicy(measure=measure, threshold=threshold)))
        assert found.finite and found.tokens == ((0,) if leaves else ())
        assert found.confidences == pytest.approx([sure] if leaves else [])
    assert one(LOGITS, HeadInput("emit", 9, policy=ThresholdPolicy(measure=measure, threshold=2.0))).tokens == (0,)


@pytest.mark.parametrize("measure", ["probability", "margin", "entropy"])
def test_a_certain_head_has_confidence_one(measure: Any) -> None:
    certain = HeadInput("leave", 3, policy=ThresholdPolicy(measure=measure, threshold=1.0))
    found = one(torch.tensor([[200.0, 0.0, 0.0, 0.0]]), certain)
    assert found.tokens == (0,) and found.confidences == (1.0,)
    even = one(torch.zeros(1, 4), HeadInput("emit", 3, policy=ThresholdPolicy(measure=measure)))
    assert even.confidences == pytest.approx([0.25 if measure == "probability" else 0.0], abs=1e-6)


@pytest.mark.parametrize(
    "proposals, emitted",
    [((), (0,)), ((0,), (0, 1)), ((1,), (0,)), ((0, 1, 2), (0, 1, 2, 0)), ((0, 2, 2), (0, 1)), ((2, 1, 2), (0,))],
)
@pytest.mark.parametrize("logprobs", [None, 2])
def test_greedy_proposals_are_accepted_up_to_the_first_that_differs(
    proposals: tuple[int, ...], emitted: tuple[int, ...], logprobs: int | None
) -> None:
    logits = torch.tensor([[3.0, 0, 0], [0, 2.0, 0], [0, 0, 1.0], [4.0, 0, 0]])[: len(proposals) + 1]
    found = one(logits, HeadInput("verify", 7, proposals=proposals, logprobs=logprobs))
    assert found.tokens == emitted
    best = logits.softmax(-1).amax(-1).tolist()
    assert found.confidences == pytest.approx(best[: len(emitted)])
    assert len(found.logprobs) == (0 if logprobs is None else len(emitted))
    for token, row, logprob in zip(emitted, logits, found.logprobs, strict=False):
        assert logprob.emitted == pytest.approx(float(row.log_softmax(-1)[token]))
        assert len(logprob.top) == 2 and max(logprob.top.values()) == pytest.approx(logprob.emitted)


def test_rows_are_answered_each_by_itself() -> None:
    """Whatever others ask: the quick way for greedy rows and the long one give the same."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 3
    top = logits.argmax(-1).tolist()
    greedy = [
        HeadInput("emit", 4),
        HeadInput("verify", 9, proposals=(top[1], top[2] + 1)),
        HeadInput("leave", 4, policy=ThresholdPolicy(threshold=2.0)),
        HeadInput("draft", 4),
    ]
    spans = [(0, 1), (1, 4), (4, 5), (5, 6)]
    together = head_outputs(logits, greedy, [[] for _ in greedy])
    assert [a.tokens for a in together] == [(top[0],), tuple(top[1:3]), (), (top[5],)]
    drawn = [*greedy[:3], replace(greedy[3], sampling=DRAWN)]
    for inputs in (greedy, drawn):
        for head_input, (start, stop), theirs in zip(
            inputs, spans, head_outputs(logits, inputs, [[] for _ in inputs]), strict=True
        ):
            ours = one(logits[start:stop], head_input)
            assert ours.tokens == theirs.tokens
            assert ours.confidences == pytest.approx(theirs.confidences, abs=1e-6)
    for one_way, other_way in zip(together[:3], head_outputs(logits, drawn, [[] for _ in drawn])[:3], strict=True):
        assert one_way.tokens == other_way.tokens
        assert one_way.confidences == pytest.approx(other_way.confidences, abs=1e-6)


def test_drawn_tokens_are_those_of_the_seed_and_position() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(2))
    p = probabilities(logits[0], DRAWN)
    draft: list[Tensor] = []
    for position in range(20):
        assert one(logits, HeadInput("emit", position, DRAWN)).tokens == (draw(p, uniform(5, position, "target")),)
        assert one(logits, HeadInput("draft", position, DRAWN), draft).tokens == (
            draw(p, uniform(5, position, "draft")),
        )
    assert len(draft) == 20 and all(torch.equal(each, p) for each in draft)


def test_drawn_proposals_are_verified_against_what_they_were_drawn_from() -> None:
    generator = torch.Generator().manual_seed(3)
    for seed in range(20):
        sampling = DRAWN.model_copy(update={"seed": seed, "top_k": 20})
        logits, other = torch.randn(2, 4, 50, generator=generator)
        draft, proposals = [], []
        for number in range(3):
            proposals += one(other[number : number + 1], HeadInput("draft", 30 + number, sampling), draft).tokens
        found = one(logits, HeadInput("verify", 30, sampling, proposals=tuple(proposals)), draft)
        target = torch.stack([probabilities(row, sampling) for row in logits])
        accepted, token = verify(target, torch.stack(draft), proposals, seed, 30)
        assert found.tokens == (*proposals[:accepted], token)


@pytest.mark.parametrize(
    "sampling", [Sampling(repetition_penalty=3.0), DRAWN.model_copy(update={"repetition_penalty": 3.0})]
)
def test_the_penalty_sees_the_proposals_before_each_place(sampling: Sampling) -> None:
    logits = torch.tensor([[4.0, 3.5, 3.0, 0.0]] * 3)
    found = one(
        logits, HeadInput("verify", 5, sampling, proposals=(0, 1), seen=(3,)), [torch.eye(4)[0], torch.eye(4)[1]]
    )
    if sampling.greedy:
        assert found.tokens == (0, 1, 2)
        assert one(logits[:1], HeadInput("leave", 5, sampling, seen=(0,))).tokens == (1,)
    else:
        p = [probabilities(penalised(logits[0], seen, 3.0), sampling) for seen in ((3,), (3, 0), (3, 0, 1))]
        accepted, token = verify(torch.stack(p), torch.eye(4)[:2], (0, 1), sampling.seed, 5)
        assert found.tokens == ((0, 1)[:accepted] + (token,))


def test_log_probabilities_come_before_temperature_and_penalty() -> None:
    sampling = Sampling(temperature=0.5, top_k=1, repetition_penalty=10.0)
    found = one(LOGITS, HeadInput("emit", 5, sampling, seen=(0,), logprobs=2))
    assert found.tokens == (1,)
    [logprobs] = found.logprobs
    assert logprobs == LogProbs(pytest.approx(math.log(0.3)), pytest.approx({0: math.log(0.6), 1: math.log(0.3)}))
    assert len(one(LOGITS, HeadInput("emit", 5, logprobs=100)).logprobs[0].top) == 3


def test_a_forced_token_has_a_log_probability_beside_the_emitted_one() -> None:
    found = one(LOGITS, HeadInput("emit", 5, logprobs=0, forced=1))
    assert found.tokens == (0,)
    assert found.logprobs == (LogProbs(pytest.approx(math.log(0.6)), {}, pytest.approx(math.log(0.3))),)


class Reads(TorchFunctionMode):
    """Counts what has to wait for a device before the host goes on."""

    NAMES = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select", "cpu")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and getattr(args[1], "dtype", None) == torch.bool
        if name in self.NAMES or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def test_a_head_needs_one_transfer_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows and tokens it has, and whatever they ask."""
    monkeypatch.setattr(platform, "queues_work", lambda device: True)
    monkeypatch.setattr(platform, "to_device", lambda tensor, where=None: tensor)
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(6))
    drawn = Sampling(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    draft = [torch.full((50,), 0.02)] * 2
    inputs = [
        HeadInput("emit", 4, drawn, seen=(1, 2, 3), logprobs=3),
        HeadInput("verify", 7, drawn, proposals=(5, 6), seen=(1, 2)),
        HeadInput("leave", 3, drawn, policy=ThresholdPolicy(measure="entropy", threshold=0.5)),
        HeadInput("draft", 9, drawn),
        HeadInput("verify", 8, proposals=(3,), logprobs=0),
        HeadInput("leave", 8, policy=ThresholdPolicy(measure="margin", threshold=0.1)),
    ]
    for chosen in (inputs, inputs[4:], [HeadInput("emit", 1)] * 9):
        with Reads() as reads:
            drafts = [
                draft if head_input.sampling == drawn and head_input.kind == "verify" else [] for head_input in chosen
            ]
            head_outputs(logits[: sum(head_input.tokens for head_input in chosen)], chosen, drafts)
        assert reads.found == {"tolist": 1}


INPUTS = {
    "plain": HeadInput("emit", 5),
    "leave": HeadInput("leave", 5, policy=ThresholdPolicy(threshold=2.0)),
    "margin": HeadInput("leave", 5, policy=ThresholdPolicy(measure="margin")),
    "entropy": HeadInput("leave", 5, policy=ThresholdPolicy(measure="entropy")),
    "drawn": HeadInput("emit", 5, DRAWN),
    "logprobs": HeadInput("emit", 5, logprobs=1),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", INPUTS)
def test_logits_that_are_not_finite_are_told_and_harm_no_other_row(kind: str, bad: float) -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(4))
    spoilt = logits.clone()
    spoilt[1, 7] = bad
    inputs = [INPUTS["plain"], INPUTS[kind], INPUTS["plain"]]
    good, found = (head_outputs(each, inputs, [[], [], []]) for each in (logits, spoilt))
    assert not found[1].finite and found[1].tokens == ()
    assert good[1].finite and [found[0], found[2]] == [good[0], good[2]]


@pytest.mark.parametrize("kind", INPUTS)
def test_a_token_without_any_probability_is_no_mistake(kind: str) -> None:
    """Whichever way a row is answered; else its fate would hang on its neighbours."""
    logits = torch.tensor([[1.0, -math.inf, 0.5]])
    found = one(logits, INPUTS[kind])
    assert found.finite and all(math.isfinite(sure) for sure in found.confidences)
    assert found.tokens in ((0,), (2,), ())
    assert not one(torch.full((1, 3), -math.inf), INPUTS[kind]).finite
