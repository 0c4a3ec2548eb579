"""Modes side by side: speculation is lossless, neighbours do not matter, seeds decide, prompts are shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Completion, Draft, Request
from megatron_ee.inference.sampling import Sampling

MakeStage = Callable[[str, Sequence[ExitSpec]], Stage]

LAYERS = 4
TOKENS = 32
EXITS = [ExitSpec(1, "layer"), ExitSpec(2), ExitSpec(3, "norm", "shared")]
PROMPTS = [[5, 17, 99, 42, 3, 77, 120], [9], list(range(30, 52)), [8, 8, 3]]
DRAWN = Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=11)


@pytest.fixture(scope="module")
def stage(exit_stage: MakeStage) -> Stage:
    """With a window in two of its layers; its exits agree with the final one now and then."""
    return exit_stage("qwen2-window", EXITS)


def generate(stage: Stage, requests: Sequence[Request], **options: Any) -> list[list[Completion]]:
    engine = make_engine(stage, EngineOptions(**options))
    found = engine.generate(requests)
    scheduler: Any = engine._scheduler
    assert engine.idle and scheduler.kv_caches.budget.used == 0 and not scheduler.stages[0].sequences
    return found


def tokens_of(completion: Completion) -> list[int]:
    return [token.id for token in completion.tokens]


def summary(completion: Completion) -> tuple[Any, ...]:
    """What must be the same whatever runs beside it."""
    return tokens_of(completion), [token.layer for token in completion.tokens], completion.finish_reason


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, None])
@pytest.mark.parametrize("exit_", [1, 2, 3, None])
def test_speculative_mode_says_what_full_mode_says(exit_: int | None, length: int | None, stage: Stage) -> None:
    full = [Request(prompt=prompt, max_tokens=TOKENS, logprobs=3) for prompt in PROMPTS[:2]]
    drafted = [
        request.model_copy(update={"mode": "speculative", "draft": Draft(exit=exit_, length=length)})
        for request in full
    ]
    for [theirs], [ours] in zip(generate(stage, full), generate(stage, drafted), strict=True):
        assert tokens_of(ours) == tokens_of(theirs)
        for one, other in zip(ours.tokens, theirs.tokens, strict=True):
            assert one.confidence == pytest.approx(other.confidence, abs=1e-4)
            assert one.logprobs is not None and other.logprobs is not None
            assert one.logprobs.emitted == pytest.approx(other.logprobs.emitted, abs=1e-3)
            assert one.logprobs.top == pytest.approx(other.logprobs.top, abs=1e-3)
        figures = ours.statistics
        assert (figures["proposed"] > 0) == (length != 0)
        per_position = figures["accepted_per_position"]
        assert sum(per_position) == figures["accepted"] <= figures["judged"] <= figures["proposed"]
        assert per_position == sorted(per_position, reverse=True)
        if length is not None and exit_ is not None:
            by_exit = Counter(token.layer for token in ours.tokens)
            assert by_exit[exit_] <= figures["accepted"] and by_exit.total() == TOKENS
            assert set(by_exit) <= {exit_, LAYERS}


def test_some_proposals_are_accepted_and_some_rejected(stage: Stage) -> None:
    """What the equality above rests on happens: whole drafts, parts of them and none are taken."""
    accepted: Counter[int] = Counter()
    per_position: Counter[int] = Counter()
    for prompt in PROMPTS:
        engine = make_engine(stage)
        number = engine.submit(Request(prompt=prompt, mode="speculative", draft=Draft(exit=3, length=3), max_tokens=60))
        for event in engine.stream(number):
            accepted[len(event.tokens) - 1] += 1
            if event.completion is not None:
                per_position.update(dict(enumerate(event.completion.statistics["accepted_per_position"])))
    assert min(accepted[count] for count in range(4)) > 0, accepted
    for place in range(3):
        assert per_position[place] == sum(count for length, count in accepted.items() if length > place)


@pytest.fixture(scope="module")
def restricted(saved_model: Callable[..., tuple[Path, Any]], load_stage: Callable[..., Stage]) -> Stage:
    """A stage whose exits draft even token ids alone."""
    stage = load_stage(saved_model("qwen2-window")[0], EXITS)
    for exit_ in stage.exits:
        exit_.head.restrict(torch.arange(0, 131, 2, device=platform.device()))
    return stage


@pytest.mark.parametrize("sampling", [pytest.param(Sampling(), marks=pytest.mark.slow), DRAWN], ids=["greedy", "drawn"])
def test_drafts_from_some_of_the_vocabulary(
    sampling: Sampling, restricted: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proposals are candidates, the full model's own tokens any; neighbours that are no drafts change nothing."""
    full = [Request(prompt=prompt, sampling=sampling, max_tokens=60) for prompt in PROMPTS]
    drafted = [request.model_copy(update={"mode": "speculative", "draft": Draft(exit=2, length=3)}) for request in full]
    leaving = [
        request.model_copy(update={"mode": "threshold", "policy": ThresholdPolicy(threshold=0.02), "exits": (2,)})
        for request in full
    ]
    proposed, others = set(), set()
    beside = generate(restricted, [*drafted, *leaving])
    for number, [ours] in enumerate(generate(restricted, drafted)):
        assert summary(ours) == summary(beside[number][0])
        proposed |= {token.id for token in ours.tokens if token.layer == 2}
        others |= {token.id for token in ours.tokens if token.layer != 2}
    assert proposed and all(token % 2 == 0 for token in proposed) and any(token % 2 for token in others)
    assert any(token.id % 2 for [one] in beside[len(drafted) :] for token in one.tokens if token.layer == 2)
    for exit_ in restricted.exits:
        monkeypatch.setattr(exit_.head, "candidates", None)
    for [theirs], [ours] in zip(generate(restricted, leaving), beside[len(drafted) :], strict=True):
        assert summary(ours) == summary(theirs), "candidates limit tokens that leave"
    if sampling.greedy:
        for [theirs], [ours] in zip(generate(restricted, full), beside, strict=False):
            assert tokens_of(ours) == tokens_of(theirs)


def mixed_requests() -> list[Request]:
    """Every mode on prompts of several lengths, greedy and drawn, with all that a sequence may have of its own."""
    found: list[Request] = []
    for number, prompt in enumerate(PROMPTS):
        count = 16 + 4 * number
        found += [
            Request(prompt=prompt, max_tokens=count),
            Request(
                prompt=prompt,
                mode="threshold",
                policy=ThresholdPolicy(threshold=0.1, max_deferred=3),
                max_tokens=count,
                logprobs=2,
            ),
            Request(
                prompt=prompt,
                mode="threshold",
                policy=ThresholdPolicy(threshold=0.03, thresholds={1: 0.2}, measure="margin", min_full=4),
                exits=(1, 3),
                max_tokens=9,
            ),
            Request(
                prompt=prompt, mode="speculative", draft=Draft(exit=1 + number % 3, length=1 + number), max_tokens=count
            ),
            Request(
                prompt=prompt,
                mode="speculative",
                draft=Draft(exit=3, length=2),
                sampling=DRAWN.model_copy(update={"seed": number}),
                max_tokens=count,
            ),
            Request(
                prompt=prompt,
                mode="threshold",
                policy=ThresholdPolicy(threshold=0.2, measure="entropy"),
                sampling=DRAWN,
                max_tokens=count,
            ),
            Request(
                prompt=prompt,
                mode="full",
                sampling=DRAWN.model_copy(update={"temperature": 1.5}),
                stop_ids=(7, 9, 30),
                max_tokens=count,
            ),
            Request(
                prompt=prompt,
                mode="threshold",
                policy=ThresholdPolicy(threshold=0.1),
                forced_ids=PROMPTS[2],
                max_tokens=count,
            ),
        ]
    return found


@pytest.fixture(scope="module")
def alone(stage: Stage) -> list[list[Completion]]:
    return [generate(stage, [request])[0] for request in mixed_requests()]


@pytest.mark.parametrize(
    ("order", "max_num_seqs"),
    [(1, 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 1), (1, 32), (-1, 1), (-1, 3), (-1, 32)))],
)
def test_rows_do_not_depend_on_their_neighbours(
    order: int, max_num_seqs: int, stage: Stage, alone: list[list[Completion]]
) -> None:
    together = generate(stage, mixed_requests()[::order], max_num_seqs=max_num_seqs)[::order]
    for request, [ours], [theirs] in zip(mixed_requests(), together, alone, strict=True):
        assert summary(ours) == summary(theirs), request
        assert [t.confidence for t in ours.tokens] == pytest.approx([t.confidence for t in theirs.tokens], abs=1e-4)
        assert ours.statistics["layers_per_token"] == theirs.statistics["layers_per_token"]
    layers = {token.layer for [completion] in alone for token in completion.tokens}
    assert layers == {1, 2, 3, 4}, "too little happens"


def test_adaptive_rows_say_the_same_beside_others(stage: Stage, alone: list[list[Completion]]) -> None:
    adaptive = [Request(prompt=prompt, mode="speculative", max_tokens=16 + 4 * i) for i, prompt in enumerate(PROMPTS)]
    together = generate(stage, [*adaptive, *mixed_requests()])
    for number, [ours] in enumerate(together[: len(adaptive)]):
        assert tokens_of(ours) == tokens_of(alone[8 * number][0])
    for [ours], [theirs] in zip(together[len(adaptive) :], alone, strict=True):
        assert summary(ours) == summary(theirs)


# -- samples and seeds


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "full"},
        {"mode": "threshold", "policy": ThresholdPolicy(threshold=0.1)},
        {"mode": "speculative", "draft": Draft(exit=2, length=3)},
    ],
    ids=["full", "threshold", "speculative"],
)
@pytest.mark.parametrize("max_num_seqs", [*(pytest.param(count, marks=pytest.mark.slow) for count in (1, 8)), 2])
@pytest.mark.parametrize("prompt", [PROMPTS[2], PROMPTS[1]], ids=["22 tokens", "1 token"])
def test_samples_are_requests_with_the_next_seeds(
    prompt: list[int], max_num_seqs: int, fields: dict[str, Any], stage: Stage
) -> None:
    request = Request(prompt=prompt, sampling=DRAWN, max_tokens=12, **fields)
    [samples] = generate(stage, [request.model_copy(update={"samples": 4})], max_num_seqs=max_num_seqs)
    seeds = [
        request.model_copy(update={"sampling": DRAWN.model_copy(update={"seed": DRAWN.seed + i})}) for i in range(4)
    ]
    singles = [generate(stage, [each])[0][0] for each in seeds]
    assert [summary(one) for one in samples] == [summary(one) for one in singles]
    assert len({tuple(tokens_of(one)) for one in samples}) > 1
    [again] = generate(stage, [request.model_copy(update={"samples": 4})], max_num_seqs=max_num_seqs)
    assert [summary(one) for one in again] == [summary(one) for one in samples]


def test_samples_share_the_prompt(stage: Stage) -> None:
    """Its tokens but the last run once: the first layer sees them no more often than for one output."""
    ran: list[int] = []
    layer = dict(stage.backbone.numbered_layers())[1]
    handle = layer.attention.register_forward_hook(lambda _module, args, _output: ran.append(len(args[0])))
    try:
        request = Request(prompt=PROMPTS[2], sampling=DRAWN, max_tokens=6)
        generate(stage, [request.model_copy(update={"samples": 5})])
    finally:
        handle.remove()
    prompt = len(PROMPTS[2])
    assert ran[0] == prompt - 1  # before anything is emitted
    assert sum(ran) == prompt - 1 + 5 * 6


@pytest.mark.parametrize("prompt", [PROMPTS[2], PROMPTS[1]], ids=["22 tokens", "1 token"])
def test_a_sample_that_comes_late_does_not_wait_for_the_first_to_end(prompt: list[int], stage: Stage) -> None:
    """The first one has run the prompt before there is a sequence for the second."""
    engine = make_engine(stage, EngineOptions(max_num_seqs=2))
    engine.submit(Request(prompt=PROMPTS[0], max_tokens=3))
    number = engine.submit(Request(prompt=prompt, sampling=DRAWN, samples=2, max_tokens=60))
    emitted: Counter[int] = Counter()
    for event in engine.stream(number):
        emitted[event.sample] += len(event.tokens)
        if event.sample == 0 and event.completion is not None:
            assert emitted[1] > 40
    assert emitted == {0: 60, 1: 60}


@pytest.mark.parametrize("mode", ["full", "threshold", "speculative"])
def test_the_seed_alone_decides(mode: Any, stage: Stage) -> None:
    request = Request(
        prompt=PROMPTS[0],
        mode=mode,
        policy=ThresholdPolicy(threshold=0.1),
        draft=Draft(exit=2, length=3),
        sampling=DRAWN,
        max_tokens=20,
    )
    others = [request.model_copy(update={"sampling": DRAWN.model_copy(update={"seed": seed})}) for seed in range(6)]
    first, again = (generate(stage, [request])[0][0] for _ in range(2))
    assert summary(first) == summary(again)
    found = [tokens_of(one) for [one] in generate(stage, others)]
    assert len(set(map(tuple, found))) > 4


def test_full_and_speculative_mode_draw_the_first_token_alike(stage: Stage) -> None:
    """Without proposals speculative mode is full mode, drawn tokens included."""
    full = Request(prompt=PROMPTS[0], sampling=DRAWN, max_tokens=20)
    [[theirs]] = generate(stage, [full])
    [[ours]] = generate(stage, [full.model_copy(update={"mode": "speculative", "draft": Draft(exit=1, length=0)})])
    assert tokens_of(ours) == tokens_of(theirs)


def test_drawn_speculation_with_open_settings_is_deterministic(stage: Stage) -> None:
    """Measured time must not decide on what is drawn."""
    request = Request(prompt=PROMPTS[0], mode="speculative", sampling=DRAWN, max_tokens=30)
    found = [generate(stage, [request, *mixed_requests()[: 4 * i]])[0][0] for i in range(3)]
    assert summary(found[0]) == summary(found[1]) == summary(found[2])


@pytest.mark.parametrize("mode", ["full", "threshold", "speculative"])
def test_the_repetition_penalty_keeps_tokens_from_coming_again(mode: Any, stage: Stage) -> None:
    plain = Request(
        prompt=PROMPTS[0],
        mode=mode,
        policy=ThresholdPolicy(threshold=0.1),
        draft=Draft(exit=2, length=3),
        max_tokens=40,
    )
    [[free], [held]] = generate(
        stage, [plain, plain.model_copy(update={"sampling": Sampling(repetition_penalty=1000.0)})]
    )
    seen, again = set(PROMPTS[0]), 0
    for token in tokens_of(held):
        again += token in seen
        seen.add(token)
    assert again == 0 < len([*PROMPTS[0], *tokens_of(free)]) - len({*PROMPTS[0], *tokens_of(free)})
    if mode == "speculative":
        [[full]] = generate(
            stage, [plain.model_copy(update={"mode": "full", "sampling": Sampling(repetition_penalty=1000.0)})]
        )
        assert tokens_of(held) == tokens_of(full)


# -- log-probabilities


@pytest.mark.parametrize("mode", ["full", "speculative"])
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_log_probabilities_are_those_of_transformers(
    sampling: Sampling, mode: Any, stage: Stage, saved_model: Callable[..., tuple[Path, Any]]
) -> None:
    """Before temperature, penalties and the like."""
    model = saved_model("qwen2-window")[1]
    prompt = PROMPTS[0]
    request = Request(
        prompt=prompt, mode=mode, draft=Draft(exit=2, length=3), sampling=sampling, logprobs=5, max_tokens=TOKENS
    )
    [[completion]] = generate(stage, [request])
    with torch.no_grad():
        scores: Tensor = model(torch.tensor([[*prompt, *tokens_of(completion)]])).logits[0].log_softmax(-1)
    for number, token in enumerate(completion.tokens):
        row = scores[len(prompt) - 1 + number]
        assert token.logprobs is not None and len(token.logprobs.top) == 5
        assert token.logprobs.emitted == pytest.approx(float(row[token.id]), abs=1e-3)
        best = row.topk(5)
        expected = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        assert token.logprobs.top == pytest.approx(expected, abs=1e-3)


def test_log_probabilities_are_given_only_where_asked_for(stage: Stage) -> None:
    [[none], [zero]] = generate(
        stage, [Request(prompt=PROMPTS[0], logprobs=count, max_tokens=4) for count in (None, 0)]
    )
    assert all(token.logprobs is None for token in none.tokens)
    assert all(token.logprobs is not None and token.logprobs.top == {} for token in zero.tokens)
    assert tokens_of(none) == tokens_of(zero)
