"""What one request may want of the engine: where it ends, its text, cancelling; and a bad one harms no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ee.errors import ConfigError, UserError
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Completion, Draft, Event, Request
from megatron_ee.inference.sampling import Sampling

PROMPT = "Once upon a time"
EXITS = [ExitSpec(1), ExitSpec(2, "layer")]
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "threshold": {"mode": "threshold", "policy": ThresholdPolicy(threshold=0.02, max_deferred=3)},
    "speculative": {"mode": "speculative", "draft": Draft(exit=2, length=3)},
}
DRAWN = Sampling(temperature=1.0, seed=2)


@pytest.fixture(scope="module")
def stage(byte_model: Path, load_stage: Callable[..., Stage]) -> Stage:
    return load_stage(byte_model, EXITS)


@pytest.fixture(scope="module")
def tokenizer(byte_model: Path) -> Tokenizer:
    return load_tokenizer(byte_model)


@pytest.fixture
def engine(stage: Stage, tokenizer: Tokenizer) -> Iterator[Engine]:
    """Nothing may be left in it."""
    engine = make_engine(stage, tokenizer=tokenizer)
    yield engine
    scheduler: Any = engine._scheduler
    assert engine.idle and scheduler.kv_caches.budget.used == 0
    assert not scheduler.stages[0].sequences and not engine._outputs


def answer(engine: Engine, **fields: Any) -> Completion:
    return engine.generate([Request(**{"prompt": PROMPT, "max_tokens": 20, **fields})])[0][0]


def ids_of(completion: Completion) -> list[int]:
    return [token.id for token in completion.tokens]


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Of tokens behind the prompt."""
    prompt = tokenizer.encode_prompt(PROMPT)
    return tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]


def new_at(ids: Sequence[int], start: int) -> int:
    """The first place from ``start`` whose token did not come before."""
    return next(i for i in range(start, len(ids)) if ids[i] not in ids[:i])


# -- where an output ends


@pytest.mark.parametrize("mode", MODES)
def test_end_of_text_stops_and_is_emitted_but_no_text(mode: str, stage: Stage, tokenizer: Tokenizer) -> None:
    free = answer(make_engine(stage, tokenizer=tokenizer), **MODES[mode])
    ids = ids_of(free)
    for place in (0, new_at(ids, 2), new_at(ids, 5)):
        for eos in ({ids[place]}, {ids[place], 257}):
            ended = answer(make_engine(stage, tokenizer=tokenizer, eos=eos), **MODES[mode])
            assert ids_of(ended) == ids[: place + 1] and ended.finish_reason == "eos"
            assert len(ended.pieces) == place + 1 and ended.text == "".join(ended.pieces)
            assert ended.text == text_of(tokenizer, ids[:place])
            on = answer(make_engine(stage, tokenizer=tokenizer, eos=eos), ignore_eos=True, **MODES[mode])
            assert ids_of(on) == ids and on.finish_reason == "length"


@pytest.mark.parametrize("mode", MODES)
def test_stop_ids_end_it_and_are_text(mode: str, engine: Engine, tokenizer: Tokenizer) -> None:
    free = answer(engine, **MODES[mode])
    place = new_at(ids_of(free), 3)
    ended = answer(engine, stop_ids=[ids_of(free)[place], 257], **MODES[mode])
    assert ids_of(ended) == ids_of(free)[: place + 1] and ended.finish_reason == "stop"
    assert ended.text == text_of(tokenizer, ids_of(ended))
    assert ids_of(answer(engine, stop_ids=[ids_of(free)[0]], **MODES[mode])) == ids_of(free)[:1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_no_more_tokens_than_asked_for(count: int, mode: str, engine: Engine) -> None:
    free = answer(engine, **MODES[mode])
    ended = answer(engine, max_tokens=count, **MODES[mode])
    assert ids_of(ended) == ids_of(free)[:count] and ended.finish_reason == "length"
    figures = ended.statistics
    assert figures["tokens"] == count and (figures["layers_per_token"] is None) == (count == 1)
    assert (figures["tokens_per_second"] is None) == (count == 1)


@pytest.mark.parametrize("mode", MODES)
def test_stops_at_the_end_of_the_context(mode: str, engine: Engine) -> None:
    for length in (60, 63):
        ended = answer(engine, prompt=[5] * length, max_tokens=50, **MODES[mode])
        assert len(ended.tokens) == 64 - length and ended.finish_reason == "context"


@pytest.mark.parametrize("mode", MODES)
def test_stop_texts_end_it_and_are_no_text(mode: str, stage: Stage, tokenizer: Tokenizer) -> None:
    drawn = {"sampling": DRAWN, **MODES[mode]}
    engine = make_engine(stage, tokenizer=tokenizer)
    free = answer(engine, **drawn)
    printable = [i for i in range(4, 16) if len(free.text) > i + 3 and "\ufffd" not in free.text[i : i + 3]]
    for at in printable[:3]:
        stop = free.text[at : at + 3]
        ended = answer(engine, stop=["not in there", stop], **drawn)
        assert ended.finish_reason == "stop"
        assert ended.text == free.text[: free.text.index(stop)] == "".join(ended.pieces)
        assert ids_of(ended) == ids_of(free)[: len(ended.tokens)] and len(ended.pieces) == len(ended.tokens)
        assert stop not in text_of(
            tokenizer, ids_of(ended)[:-1]
        )  # nothing is emitted beyond the token that completes it
    assert printable


def test_a_stop_text_that_only_the_end_completes_is_one_all_the_same(engine: Engine, tokenizer: Tokenizer) -> None:
    free = ids_of(answer(engine, sampling=DRAWN))
    place = next(i for i, token in enumerate(free) if tokenizer.decode([token]) == "\ufffd")  # half a character
    ended = answer(engine, sampling=DRAWN, max_tokens=place + 1, stop=["\ufffd"])
    assert ids_of(ended) == free[: place + 1] and "\ufffd" not in ended.text
    assert ended.finish_reason == ended.statistics["finish_reason"] == "stop"


def test_a_stop_text_that_does_not_come_holds_nothing_back(engine: Engine) -> None:
    free = answer(engine, sampling=DRAWN)
    held = answer(engine, sampling=DRAWN, stop=[free.text[-1] + "never", "?" * 40])
    assert (held.text, held.finish_reason, ids_of(held)) == (free.text, "length", ids_of(free))


# -- text


@pytest.mark.parametrize("mode", MODES)
def test_the_streamed_text_is_the_text(mode: str, engine: Engine, tokenizer: Tokenizer) -> None:
    number = engine.submit(Request(prompt=PROMPT, max_tokens=40, sampling=DRAWN, stop=["zz"], **MODES[mode]))
    events = list(engine.stream(number))
    completion = events[-1].completion
    assert completion is not None and all(event.completion is None for event in events[:-1])
    assert "".join(event.text for event in events) == completion.text == "".join(completion.pieces)
    assert tuple(token for event in events for token in event.tokens) == completion.tokens
    assert completion.text == text_of(tokenizer, ids_of(completion))
    assert len(events) > 10


@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_begins_with_the_prompt(as_ids: bool, engine: Engine, tokenizer: Tokenizer) -> None:
    prompt: Any = tokenizer.encode_prompt(PROMPT) if as_ids else PROMPT
    plain, echoed = (answer(engine, prompt=prompt, echo=echo) for echo in (False, True))
    assert echoed.text == (tokenizer.decode(prompt) if as_ids else PROMPT) + plain.text
    assert (echoed.tokens, echoed.pieces) == (plain.tokens, plain.pieces)
    replayed = answer(engine, prompt=prompt, echo=True, replay_ids=[9, 8, 7])
    assert replayed.text == (tokenizer.decode(prompt) if as_ids else PROMPT) + "".join(replayed.pieces)


def test_without_a_tokenizer_there_are_only_ids(stage: Stage) -> None:
    engine = make_engine(stage)
    completion = answer(engine, prompt=[5, 6])
    assert completion.text == "" and len(completion.tokens) == 20
    with pytest.raises(ConfigError, match="^prompt: is text, but there is no tokenizer"):
        engine.submit(Request(prompt=PROMPT))
    with pytest.raises(ConfigError, match="^stop: needs a tokenizer"):
        engine.submit(Request(prompt=[5, 6], stop=["x"]))
    assert engine.idle


def test_statistics(engine: Engine) -> None:
    always = {"mode": "threshold", "policy": ThresholdPolicy(threshold=1e-9, max_deferred=2)}
    first = answer(engine, max_tokens=9, **always)
    assert [token.layer for token in first.tokens] == [4, 1, 1, 4, 1, 1, 4, 1, 1]
    figures = first.statistics
    assert (figures["prompt_tokens"], figures["tokens"]) == (len(PROMPT) + 1, 9)
    assert figures["tokens_by_layer"] == {"1": 6, "4": 3}
    assert figures["mean_exit_layer"] == pytest.approx((3 * 4 + 6 * 1) / 9)
    # 8 passes; 6 of their tokens have run all 4 layers, the last 2 one layer so far. Nothing asked the exit after 2.
    assert figures["deferred_tokens"] == 2
    assert (figures["layer_runs"], figures["later_tokens"]) == (6 * 4 + 2 * 1, 8)
    assert figures["layers_per_token"] == pytest.approx((6 * 4 + 2 * 1) / 8)
    assert figures["tokens_per_second"] > 0 and 0 < figures["queue_time"] < figures["time_to_first_token"]
    assert figures["decode_time"] == pytest.approx(8 / figures["tokens_per_second"])
    assert figures["acceptance_rate"] is None
    second = answer(engine, max_tokens=5)
    number = engine.submit(Request(prompt=PROMPT))
    engine.cancel(number)
    engine.step()
    totals = engine.statistics()
    assert (totals["outputs"], totals["tokens"]) == (3, 14)
    assert totals["tokens_by_layer"] == {"1": 6, "4": 8}
    assert second.statistics["layers_per_token"] == 4  # full mode
    assert totals["layers_per_token"] == pytest.approx((6 * 4 + 2 + 4 * 4) / 12)
    assert totals["mean_time_to_first_token"] > 0  # type: ignore[operator]


def test_a_draft_is_a_round_with_a_proposal(engine: Engine) -> None:
    plain, drafted = (
        answer(engine, mode="speculative", draft=Draft(exit=2, length=length)).statistics for length in (0, 3)
    )
    assert (plain["rounds"], plain["drafts"], plain["proposed"]) == (19, 0, 0)
    assert 0 < drafted["drafts"] <= drafted["proposed"] <= 3 * drafted["drafts"]
    assert drafted["acceptance_rate"] == drafted["accepted"] / drafted["proposed"]


# -- cancelling and closing


def last(events: Sequence[Event], request: int) -> Completion:
    [found] = [e.completion for e in events if e.request == request and e.completion is not None]
    return found


@pytest.mark.parametrize("mode", MODES)
def test_running_and_waiting_requests_can_be_cancelled(mode: str, stage: Stage, tokenizer: Tokenizer) -> None:
    engine = make_engine(stage, EngineOptions(max_num_seqs=2), tokenizer=tokenizer)
    free = [answer(engine, prompt=prompt, max_tokens=30, **MODES[mode]) for prompt in ("one", "two", "three", "four")]
    numbers = [
        engine.submit(Request(prompt=prompt, max_tokens=30, **MODES[mode]))
        for prompt in ("one", "two", "three", "four")
    ]
    events: list[Event] = []
    while sum(len(event.tokens) for event in events if event.request == numbers[0]) < 5:
        events += engine.step()
    engine.cancel(numbers[0])  # in work
    engine.cancel(numbers[2])  # in line
    engine.cancel(12345)
    while not engine.idle:
        events += engine.step()
    ours = [last(events, number) for number in numbers]
    assert [one.finish_reason for one in ours] == ["cancelled", "length", "cancelled", "length"]
    assert ids_of(ours[1]) == ids_of(free[1]) and ids_of(ours[3]) == ids_of(free[3])
    assert 5 <= len(ours[0].tokens) < 30 and ids_of(ours[0]) == ids_of(free[0])[: len(ours[0].tokens)]
    assert free[0].text.startswith(ours[0].text) and ours[2].tokens == ()
    engine.cancel(numbers[1])  # it has ended
    assert engine.idle


def test_all_samples_are_cancelled(engine: Engine) -> None:
    number = engine.submit(Request(prompt=PROMPT, sampling=DRAWN, samples=3))
    for _ in range(6):
        engine.step()
    engine.cancel(number)
    events = list(engine.stream(number))
    assert sorted(event.sample for event in events if event.completion is not None) == [0, 1, 2]


def test_cancelling_the_first_sample_of_a_waiting_prompt_lets_others_run(engine: Engine) -> None:
    """Only through the scheduler: requests are cancelled whole."""
    [alone] = engine.generate([Request(prompt=PROMPT, sampling=DRAWN, samples=3)])
    engine.submit(Request(prompt=PROMPT, sampling=DRAWN, samples=3))
    scheduler: Any = engine._scheduler
    parent = scheduler.waiting[0].seq_id
    scheduler.finish(parent, "cancelled")
    del engine._outputs[parent]
    events = []
    while not engine.idle:
        events += engine.step()
    ends = {event.sample: event.completion for event in events if event.completion is not None}
    assert set(ends) == {1, 2}
    for sample, completion in ends.items():
        assert ids_of(completion) == ids_of(alone[sample])


def test_close_ends_everything(stage: Stage, tokenizer: Tokenizer) -> None:
    engine = make_engine(stage, EngineOptions(max_num_seqs=1), tokenizer=tokenizer)
    engine.submit(Request(prompt=PROMPT))
    engine.submit(Request(prompt=PROMPT))
    engine.step()
    engine.close()
    ends = [event.completion for event in engine.step()]
    assert [end.finish_reason for end in ends if end is not None] == ["cancelled", "cancelled"] and engine.idle
    with pytest.raises(ConfigError, match="^the engine is closed$"):
        engine.submit(Request(prompt=PROMPT))
    engine.close()


def test_close_after_a_failure_waits_for_no_pass(
    stage: Stage, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(stage, tokenizer=tokenizer)
    engine.submit(Request(prompt=PROMPT))
    scheduler: Any = engine._scheduler

    def fail() -> None:
        raise RuntimeError("a rank is lost")

    monkeypatch.setattr(scheduler, "_update", fail)
    with pytest.raises(RuntimeError):
        engine.step()
    assert scheduler._pending
    engine.close()


def test_streams_take_turns(engine: Engine) -> None:
    """What a stream meets of another request is kept for that one's."""
    free = {prompt: answer(engine, prompt=prompt) for prompt in ("one", "two")}
    first, second = (engine.submit(Request(prompt=prompt, max_tokens=20)) for prompt in ("one", "two"))
    one, two = engine.stream(first), engine.stream(second)
    heads = [next(two), next(one), next(two)]
    events = [*heads, *one, *two]
    assert ids_of(last(events, first)) == ids_of(free["one"]) and ids_of(last(events, second)) == ids_of(free["two"])
    for number in (first, second):
        tokens = [token for event in events if event.request == number for token in event.tokens]
        assert tuple(tokens) == last(events, number).tokens
    assert list(engine.stream(first)) == []  # its events have been given
    assert list(engine.stream(999)) == []


# -- one that fails


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("wanted", [{}, {"logprobs": 1}], ids=["plain", "with logprobs"])
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_logits_that_are_not_finite_fail_one_request(
    layer: int, wanted: dict[str, Any], value: float, stage: Stage, tokenizer: Tokenizer
) -> None:
    threshold, speculative = MODES["threshold"], MODES["speculative"]
    requests = [
        Request(prompt=PROMPT, exits=(1,), max_tokens=12, **threshold, **wanted),
        Request(prompt=PROMPT, exits=(2,), max_tokens=12, **threshold, **wanted),
        Request(prompt=PROMPT, max_tokens=12, **speculative),
        Request(prompt=PROMPT, max_tokens=12),
    ]
    fails = {1: [0], 2: [1, 2], 4: [0, 1, 2, 3]}[layer]
    free = [make_engine(stage, tokenizer=tokenizer).generate([request])[0][0] for request in requests]
    weight = next((e.head.matrix.weight for e in stage.exits if e.spec.layer == layer), stage.backbone.head.weight)
    before = weight.detach().clone()
    engine = make_engine(stage, tokenizer=tokenizer)
    with torch.no_grad():
        weight[77] = value
    try:
        numbers = [engine.submit(request) for request in requests]
        events: list[Event] = []
        while not engine.idle:
            events += engine.step()
    finally:
        with torch.no_grad():
            weight.copy_(before)
    for index, number in enumerate(numbers):
        ends = [event for event in events if event.request == number and (event.completion or event.error)]
        assert len(ends) == 1
        if index in fails:
            error = ends[0].error or ""
            assert error.startswith(f"the logits after layer {layer} at position ") and error.endswith("are not finite")
        else:
            assert ends[0].completion is not None and ids_of(ends[0].completion) == ids_of(free[index])
    scheduler: Any = engine._scheduler
    assert scheduler.kv_caches.budget.used == 0 and not scheduler.stages[0].sequences and not engine._outputs


def test_generate_leaves_nothing_behind_where_one_is_refused_or_fails(engine: Engine, stage: Stage) -> None:
    with pytest.raises(ConfigError, match="^prompt: is empty"):
        engine.generate([Request(prompt=PROMPT), Request(prompt="")])
    assert engine.idle
    head: Any = stage.exits[0].head.matrix.weight
    before = head.detach().clone()
    with torch.no_grad():
        head[3] = float("nan")
    try:
        with pytest.raises(UserError, match="^the logits after layer 1 at position 18 are not finite$"):
            engine.generate([Request(prompt=PROMPT), Request(prompt=PROMPT, max_tokens=9, **MODES["threshold"])])
    finally:
        with torch.no_grad():
            head.copy_(before)
    assert engine.idle
    assert len(answer(engine).tokens) == 20
