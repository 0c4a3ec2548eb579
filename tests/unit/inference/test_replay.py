"""A replay: what every exit says at each token of a text, from one pass, whatever runs beside it and how it is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import megatron_ee.inference.kv_cache as kv_cache
import megatron_ee.inference.replay as replay_module
import megatron_ee.inference.scheduler as scheduler_module
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError, UserError
from megatron_ee.exits.stage import Stage
from megatron_ee.inference import kv_cache_manager
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import MEASURES, ThresholdPolicy
from megatron_ee.inference.replay import ExitReplay
from megatron_ee.inference.requests import Completion, Draft, Request

MakeStage = Callable[[str, Sequence[ExitSpec]], Stage]
EveryLogit = Callable[[Stage, Sequence[int]], dict[int, Tensor]]

RUNS = {  # every body and every head
    "llama3.1": [ExitSpec(1, "layer", gate=True), ExitSpec(2, "mlp"), ExitSpec(4, "norm", "shared")],
    "qwen2-window": [ExitSpec(1, "embedding"), ExitSpec(3, "layer", "low_rank", rank=4)],
    "gemma2": [ExitSpec(2, "norm", "low_rank", rank=4, gate=True), ExitSpec(3, "mlp", "shared")],
}
PROMPT = (5, 17, 99, 42, 3, 77, 120)
TEXT = (64, 3, 2, 9, 9, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 7, 7, 8, 100, 101)


def replayed(stage: Stage, *requests: Request, **options: Any) -> list[Completion]:
    return [found[0] for found in make_engine(stage, EngineOptions(**options)).generate(requests)]


def check(
    replay: Sequence[ExitReplay], logits: dict[int, Tensor], prompt: Sequence[int], text: Sequence[int], measure: str
) -> None:
    """Compare a replay with the logits of a pass without cache, by depth."""
    assert [exit_.depth for exit_ in replay] == sorted(logits)
    for exit_ in replay:
        rows = logits[exit_.depth][len(prompt) - 1 : len(prompt) + len(text) - 1].float().cpu()
        shares = rows.softmax(-1)
        own = shares[range(len(text)), list(text)]
        assert exit_.tokens == tuple(rows.argmax(-1).tolist())
        assert exit_.probabilities == pytest.approx(shares.amax(-1).tolist(), abs=1e-4)
        assert exit_.confidences == pytest.approx(MEASURES[measure](rows).tolist(), abs=1e-4)
        assert exit_.text_probabilities == pytest.approx(own.tolist(), abs=1e-4)
        assert exit_.text_ranks == tuple(((shares > own[:, None]).sum(-1) + 1).tolist())
        assert exit_.finite


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("family", RUNS)
def test_every_exit_says_what_it_says_without_a_cache(
    family: str, measure: str, exit_stage: MakeStage, every_logit: EveryLogit
) -> None:
    stage = exit_stage(family, RUNS[family])
    policy = ThresholdPolicy(measure=measure)
    [found] = replayed(stage, Request(prompt=PROMPT, replay_ids=TEXT, policy=policy))
    logits = every_logit(stage, [*PROMPT, *TEXT])
    check(found.replay, logits, PROMPT, TEXT, measure)
    gated = [exit_.depth for exit_ in found.replay if exit_.gates]
    assert gated == [spec.layer for spec in RUNS[family] if spec.gate]
    assert len(found.tokens) == 1 and found.tokens[0].id == found.replay[-1].tokens[-1]


def test_validation_gives_the_same_tokens_and_confidences(exit_stage: MakeStage) -> None:
    stage = exit_stage("llama3.1", RUNS["llama3.1"])
    [found] = replayed(stage, Request(prompt=PROMPT, replay_ids=TEXT))
    ids = torch.tensor([[*PROMPT, *TEXT]])
    positions, labels = stage.backbone.positions(ids.shape[1]), ids[0].roll(-1)
    h, taps = stage.run_layers(stage.backbone.embed(ids), positions, to_end=True)
    stats = {e.spec.layer: e.statistics(taps[e.spec.layer], positions, labels) for e in stage.exits}
    stats[5] = stage.final_statistics(h, labels)
    part = slice(len(PROMPT) - 1, ids.shape[1] - 1)
    for exit_ in found.replay:
        theirs = stats[exit_.depth]
        assert exit_.tokens == tuple(theirs.top1[part].tolist())
        assert exit_.probabilities == pytest.approx(theirs.confidence[part].tolist(), abs=1e-5)
        losses = [-torch.tensor(share).log().item() for share in exit_.text_probabilities]
        assert losses == pytest.approx(theirs.loss[part].tolist(), abs=1e-4)


@pytest.mark.parametrize("family", ["llama3.1", "qwen2-window"])
def test_threshold_mode_says_the_same_where_a_token_left(family: str, exit_stage: MakeStage) -> None:
    """At the exit that emitted a token, the pass over many tokens says what the pass over one said."""
    stage = exit_stage(family, RUNS[family])
    policy = ThresholdPolicy(threshold=0.02, max_deferred=3, backoff=0)
    for layer in (spec.layer for spec in RUNS[family] if spec.layer < 4):
        request = Request(prompt=PROMPT, mode="threshold", policy=policy, exits=(layer,), max_tokens=24)
        [answer] = replayed(stage, request)
        [found] = replayed(stage, Request(prompt=PROMPT, replay_ids=[token.id for token in answer.tokens]))
        [exit_] = [each for each in found.replay if each.depth == layer]
        left = [(index, token) for index, token in enumerate(answer.tokens) if token.layer == layer]
        assert len(left) > 8
        for index, token in left:
            assert exit_.tokens[index] == token.id and exit_.text_ranks[index] == 1
            assert exit_.probabilities[index] == pytest.approx(token.confidence, abs=1e-4)


def test_the_final_exit_says_full_modes_own_answer(exit_stage: MakeStage) -> None:
    stage = exit_stage("gemma2", RUNS["gemma2"])
    [answer] = replayed(stage, Request(prompt=PROMPT, max_tokens=30))
    ids = tuple(token.id for token in answer.tokens)
    [found] = replayed(stage, Request(prompt=PROMPT, replay_ids=ids))
    final = found.replay[-1]
    assert final.depth == 5 and final.tokens == ids and set(final.text_ranks) == {1}
    assert final.probabilities == pytest.approx([token.confidence for token in answer.tokens], abs=1e-4)


def test_passes_of_any_size_beside_any_requests(
    exit_stage: MakeStage, every_logit: EveryLogit, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = exit_stage("qwen2-window", RUNS["qwen2-window"])
    monkeypatch.setattr(scheduler_module, "PASS_TOKENS", 5)
    monkeypatch.setattr(replay_module, "CHUNK", 3)
    policy = ThresholdPolicy(threshold=0.05)
    others = [
        Request(prompt=PROMPT, mode="threshold", policy=policy, max_tokens=20),
        Request(prompt=PROMPT[:2], mode="speculative", draft=Draft(exit=1, length=2), max_tokens=20),
    ]
    texts = [((9,), TEXT[:1]), (PROMPT, TEXT), (PROMPT[:1], TEXT[:9])]
    asked = [Request(prompt=prompt, replay_ids=text) for prompt, text in texts]
    found = replayed(stage, *others, *asked)
    for one, (prompt, text) in zip(found[2:], texts, strict=True):
        check(one.replay, every_logit(stage, [*prompt, *text]), prompt, text, "probability")
    assert all(not one.replay for one in found[:2])


def test_preempted_replays_begin_again(
    exit_stage: MakeStage, every_logit: EveryLogit, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = exit_stage("llama3.1", RUNS["llama3.1"])
    for module in (kv_cache, kv_cache_manager):
        monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(scheduler_module, "PASS_TOKENS", 4)
    prompt = list(range(20, 30))
    engine: Any = make_engine(stage)
    budget = engine._scheduler.kv_caches.budget
    budget.total = int(2.2 * budget.needed(40, 32))
    asked = [Request(prompt=prompt, max_tokens=30), *[Request(prompt=PROMPT, replay_ids=TEXT)] * 3]
    found = engine.generate(asked)
    assert engine.statistics()["num_preempted"] > 0, "nothing was preempted"
    logits = every_logit(stage, [*PROMPT, *TEXT])
    for [one] in found[1:]:
        check(one.replay, logits, PROMPT, TEXT, "probability")


def test_kept_prefixes_do_not_leave_out_replayed_tokens(
    exit_stage: MakeStage, every_logit: EveryLogit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache_manager, "MIN_PREFIX", 2)
    stage = exit_stage("llama3.1", RUNS["llama3.1"])
    engine = make_engine(stage, EngineOptions(prefix_cache_seqs=2))
    [[first]] = engine.generate([Request(prompt=(*PROMPT, *TEXT), max_tokens=3)])
    [[found]] = engine.generate([Request(prompt=PROMPT, replay_ids=TEXT)])
    assert found.statistics["reused_tokens"] == len(PROMPT) - 1
    check(found.replay, every_logit(stage, [*PROMPT, *TEXT]), PROMPT, TEXT, "probability")


def test_logits_that_are_no_numbers_are_told(exit_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = exit_stage("llama3.1", RUNS["llama3.1"])
    head = stage.exits[1].head
    monkeypatch.setattr(head, "logits", lambda z: torch.full((len(z), 131), torch.nan))
    with pytest.raises(UserError, match="^the logits after layer 2 are not finite$"):
        replayed(stage, Request(prompt=PROMPT, replay_ids=TEXT))
    [found] = replayed(stage, Request(prompt=PROMPT, replay_ids=TEXT, exits=(1, 4)))  # it is not asked
    assert [exit_.depth for exit_ in found.replay] == [1, 4, 5]


def test_refuses_what_cannot_be_replayed(exit_stage: MakeStage) -> None:
    for fields in ({"mode": "threshold"}, {"samples": 2}, {"forced_ids": (1,)}):
        with pytest.raises(ValidationError, match="replay_ids: needs mode full, one sample, and no forced_ids"):
            Request(prompt=PROMPT, replay_ids=TEXT, **fields)
    engine = make_engine(exit_stage("llama3.1", RUNS["llama3.1"]))
    with pytest.raises(ConfigError, match="^replay_ids: token ids must be whole numbers from 0 to 130"):
        engine.submit(Request(prompt=PROMPT, replay_ids=(131,)))
    with pytest.raises(ConfigError, match="^replay_ids: the prompt has 130 tokens with them; there may be 129"):
        engine.submit(Request(prompt=PROMPT, replay_ids=(3,) * 123))
    [[found]] = engine.generate([Request(prompt=PROMPT, replay_ids=(3,) * 122)])  # it fills the context
    assert len(found.replay[0].tokens) == 122
