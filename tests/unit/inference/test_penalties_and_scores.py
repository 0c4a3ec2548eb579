"""Frequency and presence penalties, log-probabilities of given texts, and the text of each event's tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Completion, Draft, Request
from megatron_ee.inference.sampling import Sampling, count_penalised

EXITS = [ExitSpec(1, "layer"), ExitSpec(2), ExitSpec(3, "norm", "shared")]
PROMPT = [5, 17, 99, 42, 3, 77, 120]
PENALTY = {"frequency_penalty": 1.5, "presence_penalty": 2.0}


@pytest.fixture(scope="module")
def stage(exit_stage: Callable[[str, Sequence[ExitSpec]], Stage]) -> Stage:
    return exit_stage("qwen2-window", EXITS)


def generate(stage: Stage, *requests: Request) -> list[Completion]:
    return [completion for outputs in make_engine(stage).generate(requests) for completion in outputs]


def ids_of(completion: Completion) -> list[int]:
    return [token.id for token in completion.tokens]


def test_counts_are_subtracted() -> None:
    logits = torch.arange(12.0).reshape(2, 6)
    samplings = [Sampling(frequency_penalty=0.5, presence_penalty=-1.0), Sampling()]
    found = count_penalised(logits, [[1, 1, 4], [2]], samplings)
    assert torch.equal(found[0], logits[0] - torch.tensor([0, 2 * 0.5 - 1.0, 0, 0, 0.5 - 1.0, 0]))
    assert torch.equal(found[1], logits[1])
    assert count_penalised(logits, [[1], [2]], [Sampling(), Sampling()]) is logits


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
@pytest.mark.parametrize("value", [2.1, -2.1, float("nan"), "1"])
def test_penalties_have_openais_limits(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})


@pytest.mark.parametrize("mode", ["full", "threshold", "speculative"])
def test_penalties_keep_tokens_of_the_output_from_coming_again(mode: Any, stage: Stage) -> None:
    settings: dict[str, Any] = {"prompt": PROMPT, "mode": mode, "policy": ThresholdPolicy(threshold=0.1)}
    settings |= {"draft": Draft(exit=2, length=3), "max_tokens": 24}
    free, held, drawn, again = generate(
        stage,
        Request(**settings),
        Request(sampling=Sampling(**PENALTY), **settings),
        Request(sampling=Sampling(temperature=0.9, seed=5, **PENALTY), **settings),
        Request(sampling=Sampling(temperature=0.9, seed=5, **PENALTY), **settings),
    )
    assert max(Counter(ids_of(held)).values()) < max(Counter(ids_of(free)).values())
    assert ids_of(drawn) == ids_of(again) != ids_of(held)
    if mode == "speculative":
        [full] = generate(stage, Request(**{**settings, "mode": "full", "sampling": Sampling(**PENALTY)}))
        assert ids_of(held) == ids_of(full)


def test_penalties_count_the_output_and_not_the_prompt(stage: Stage) -> None:
    request = Request(prompt=PROMPT, max_tokens=24, sampling=Sampling(**PENALTY))
    [held] = generate(stage, request)
    [scored] = generate(stage, Request(prompt=PROMPT, forced_ids=ids_of(held), max_tokens=24, logprobs=100))
    for place, token in enumerate(scored.tokens):
        counts = Counter(ids_of(held)[:place])
        assert token.logprobs is not None
        after = {
            other: value - (counts[other] and 1.5 * counts[other] + 2.0) for other, value in token.logprobs.top.items()
        }
        assert max(after.values()) - after[ids_of(held)[place]] < 1e-3


def test_a_replay_scores_a_given_text(stage: Stage, every_logit: Any) -> None:
    text = torch.randint(3, 131, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    request = Request(prompt=PROMPT, replay_ids=text, logprobs=2, exits=(2,))
    scored, forced, beside = generate(
        stage,
        request,
        Request(prompt=PROMPT, forced_ids=text, max_tokens=40, logprobs=2),
        Request(prompt=[9], max_tokens=10, logprobs=0),
    )
    logits = every_logit(stage, [*PROMPT, *text])
    assert [exit_.depth for exit_ in scored.replay] == [2, 5]
    for exit_ in scored.replay:
        rows = logits[exit_.depth][len(PROMPT) - 1 : -1].log_softmax(-1)
        for row, given, found in zip(rows, text, exit_.logprobs, strict=True):
            assert found.forced == pytest.approx(float(row[given]), abs=1e-4)
            assert [found.emitted, *found.top.values()] == pytest.approx(
                row.sort().values[[-1, -1, -2]].tolist(), abs=1e-4
            )
    final = scored.replay[-1]
    assert tuple(ids_of(forced)) == final.tokens  # token by token it is the same
    for token, found in zip(forced.tokens, final.logprobs, strict=True):
        assert token.logprobs is not None and token.logprobs.forced == pytest.approx(found.forced, abs=1e-4)
        assert token.logprobs.top == pytest.approx(found.top, abs=1e-4)
    assert ids_of(beside) == ids_of(generate(stage, Request(prompt=[9], max_tokens=10))[0])


def test_a_text_up_to_the_last_position_is_scored(byte_model: Path, load_stage: Callable[..., Stage]) -> None:
    stage = load_stage(byte_model)
    text = list(range(70, 150))  # more than the 64 positions; the last token is only scored
    forced, replayed = generate(
        stage,
        Request(prompt=[0], forced_ids=text, max_tokens=80),
        Request(prompt=[0], replay_ids=text[:64]),
    )
    assert len(forced.tokens) == 64 and forced.finish_reason == "context"
    assert replayed.replay[-1].tokens == tuple(ids_of(forced))


def test_events_have_the_text_of_their_tokens(byte_model: Path, load_stage: Callable[..., Stage]) -> None:
    engine = make_engine(load_stage(byte_model, [ExitSpec(2)]), tokenizer=load_tokenizer(byte_model))
    for request in (
        Request(prompt="Once", max_tokens=40, stop=("zz",)),
        Request(prompt="Once", max_tokens=40, mode="speculative", draft=Draft(exit=2, length=3)),
    ):
        events = list(engine.stream(engine.submit(request)))
        completion = events[-1].completion
        assert completion is not None
        assert [piece for event in events for piece in event.pieces] == list(completion.pieces)
        assert all(len(event.pieces) == len(event.tokens) for event in events)
        assert all("".join(event.pieces) == event.text for event in events)
