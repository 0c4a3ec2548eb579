"""Requests that cannot be answered are refused in one line that names the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.validation import validated
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import ConfigError
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import MAX_DRAFT, MAX_LOGPROBS, Draft, Request
from megatron_ee.inference.sampling import MAX_SEED, Sampling

EXITS = [ExitSpec(1), ExitSpec(2, "norm"), ExitSpec(4, "norm")]
SPECULATIVE: dict[str, Any] = {"mode": "speculative"}
THRESHOLD: dict[str, Any] = {"mode": "threshold"}


@pytest.fixture(scope="module")
def engine(byte_model: Path, load_stage: Callable[..., Stage]) -> Engine:
    return make_engine(load_stage(byte_model, EXITS), tokenizer=load_tokenizer(byte_model))


# By what is wrong alone.
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"prompt": [3, True]}, "prompt[1]: must be a whole number, not True"),
    ({"prompt": [3, 1.0]}, "prompt[1]: must be a whole number, not 1.0"),
    ({"prompt": None}, "prompt: must be text or a list, not None"),
    ({"prompt": 7}, "prompt: must be text or a list, not 7"),
    ({"mode": "fast"}, "mode: must be one of 'full', 'threshold' or 'speculative', not 'fast'"),
    ({"mode": None}, "mode: must be one of"),
    ({"policy": {"threshold": 0.0}}, "policy.threshold: must be above 0, not 0.0"),
    ({"policy": {"name": "luck"}}, "policy.name: must be one of threshold, gate, not 'luck'"),
    ({"policy": 0.5}, "policy: must be an object with the name of a policy, not 0.5"),
    ({"policy": {"treshold": 0.5}}, "policy.treshold: unknown key; did you mean 'threshold'?"),
    ({"policy": {"thresholds": {"3": 0}}}, "policy.thresholds[3]: must be above 0, not 0"),
    ({"sampling": {"seeds": 1}}, "sampling.seeds: unknown key; did you mean 'seed'?"),
    ({"exits": 1}, "exits: must be a list"),
    ({"exits": (True,)}, "exits[0]: must be a whole number"),
    ({"exits": [1, 2, 1]}, "exits: names layer 1 twice"),
    ({"draft": {"length": 99}}, f"draft.length: must be at most {MAX_DRAFT}, not 99"),
    ({"draft": {"length": -1}}, "draft.length: must be at least 0, not -1"),
    ({"draft": {"length": 1.0}}, "draft.length: must be a whole number"),
    ({"ignore_eos": 1}, "ignore_eos: must be true or false, not 1"),
    ({"echo": None}, "echo: must be true or false, not None"),
    ({"sampling": {"temperature": -1}}, "sampling.temperature: must be 0 (greedy) or from 1e-06 to 1e+06, not -1"),
    ({"sampling": {"top_p": 0}}, "sampling.top_p: must be above 0, not 0"),
    ({"samples": 0}, "samples: must be at least 1, not 0"),
    ({"samples": 129}, "samples: must be at most 128, not 129"),
    ({"samples": 2, "sampling": Sampling(seed=MAX_SEED)}, "sampling.seed: sample i of several has seed + i, "),
    ({"max_tokens": 0}, "max_tokens: must be at least 1, not 0"),
    ({"max_tokens": 2.5}, "max_tokens: must be a whole number, not 2.5"),
    ({"max_tokens": True}, "max_tokens: must be a whole number, not True"),
    ({"logprobs": -1}, "logprobs: must be at least 0, not -1"),
    ({"logprobs": MAX_LOGPROBS + 1}, f"logprobs: must be at most {MAX_LOGPROBS}, not"),
    ({"stop": "END"}, "stop: must be a list, not 'END'"),
    ({"stop": ["END", ""]}, "stop[1]: must be text of 1 or more characters, not ''"),
    ({"stop": [3]}, "stop[0]: must be text, not 3"),
    ({"stop": None}, "stop: must be a list, not None"),
    ({"stop_ids": ["x"]}, "stop_ids[0]: must be a whole number, not 'x'"),
    ({"stop_ids": 5}, "stop_ids: must be a list, not 5"),
    (
        {"forced_ids": [3], **SPECULATIVE},
        "forced_ids: speculative mode cannot verify proposals on a forced text; use another",
    ),
    ({"replay_ids": "text"}, "replay_ids: must be a list, not 'text'"),
    ({"forced_ids": "text"}, "forced_ids: must be a list, not 'text'"),
    (
        {"coverage": {"status": "sure"}},
        "coverage.status: must be one of 'certified', 'full' or 'uncertified', not 'sure'",
    ),
    ({"max_token": 3}, "max_token: unknown key; did you mean 'max_tokens'?"),
]
# By what the model has.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt: is empty; give text to continue"),
    ({"prompt": []}, "prompt: is empty; give text to continue"),
    ({"prompt": "x" * 63}, "prompt: has 64 tokens; the model's 64 positions leave room for a new token"),
    ({"prompt": [3, 258]}, "prompt: token ids must be whole numbers from 0 to 257"),
    ({"prompt": [3, -1]}, "prompt: token ids must be whole numbers from 0 to 257"),
    ({"prompt": "a\ud800b"}, "prompt: is not valid Unicode"),
    (
        {"policy": ThresholdPolicy(thresholds={3: 0.5})},
        "policy.thresholds: there is no exit after layer 3; there are: 1, 2, 4",
    ),
    ({"exits": (1, 3)}, "exits: there is no exit after layer 3; there are: 1, 2, 4"),
    ({"exits": (), **THRESHOLD}, "exits: mode threshold needs at least one"),
    ({"exits": (4,), **SPECULATIVE}, "exits: only an exit before the last layer can draft, and none is enabled"),
    ({"draft": Draft(exit=3), **SPECULATIVE}, "draft.exit: there is no exit after layer 3; there are: 1, 2"),
    (
        {"draft": Draft(exit=4), **SPECULATIVE},
        "draft.exit: the exit after layer 4 reads the last layer, so its drafts would save nothing; exits that "
        "can draft: 1, 2",
    ),
    ({"draft": Draft(exit=4)}, "draft.exit: the exit after layer 4 reads the last layer"),
    ({"draft": Draft(exit=3)}, "draft.exit: there is no exit after layer 3; there are: 1, 2"),
    (
        {"draft": Draft(exit=1), "exits": (2,), **SPECULATIVE},
        "draft.exit: there is no exit after layer 1; there are: 2",
    ),
    ({"stop_ids": [258]}, "stop_ids: token ids must be whole numbers from 0 to 257"),
    ({"forced_ids": [3, 258]}, "forced_ids: token ids must be whole numbers from 0 to 257"),
]


def names(cases: list[tuple[dict[str, Any], str]]) -> list[str]:
    return [f"{index}: {next(iter(fields))}" for index, (fields, _) in enumerate(cases)]


@pytest.mark.parametrize("fields, message", INVALID, ids=names(INVALID))
def test_refuses_what_no_model_could_answer(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(Request, {"prompt": "Once", **fields})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fields, message", REFUSED, ids=names(REFUSED))
def test_refuses_what_this_model_cannot_answer(fields: dict[str, Any], message: str, engine: Engine) -> None:
    with pytest.raises(ConfigError) as caught:
        engine.submit(Request(**{"prompt": "Once", "max_tokens": 3, **fields}))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert engine.idle


def test_every_field_is_refused_somewhere() -> None:
    assert {name for fields, _ in (*INVALID, *REFUSED) for name in fields} >= set(Request.model_fields)


def test_a_request_has_a_json_form() -> None:
    request = Request(prompt=[3, 4], mode="threshold", policy=ThresholdPolicy(thresholds={2: 0.5}), exits=[1, 2])
    assert validated(Request, json.loads(json.dumps(request.model_dump(mode="json")))) == request


def test_refused_requests_do_not_disturb_others(engine: Engine) -> None:
    fine = Request(prompt="Once", max_tokens=30)
    [[alone]] = engine.generate([fine])
    number = engine.submit(fine)
    tokens: list[Any] = []
    for fields, _ in REFUSED:
        with pytest.raises(ConfigError):
            engine.submit(fine.model_copy(update=fields))
        tokens += [token for event in engine.step() for token in event.tokens]
    tokens += [token for event in engine.stream(number) for token in event.tokens]
    assert tuple(tokens) == alone.tokens and engine.idle


@pytest.mark.parametrize("mode", ["threshold", "speculative"])
def test_modes_that_need_exits(mode: Any, byte_model: Path, load_stage: Callable[..., Stage]) -> None:
    engine = make_engine(load_stage(byte_model))
    with pytest.raises(ConfigError, match=f"^mode: {mode} needs exits; give their adapter$"):
        engine.submit(Request(prompt=[5], mode=mode))
    assert len(engine.generate([Request(prompt=[5], max_tokens=2)])[0][0].tokens) == 2


def test_settings_of_other_modes_are_ignored(engine: Engine) -> None:
    for request in (
        Request(prompt="Once", exits=(), max_tokens=2),
        Request(prompt="Once", draft=Draft(exit=2, length=3), max_tokens=2),
        Request(prompt="Once", mode="threshold", draft=Draft(exit=2, length=3), max_tokens=2),
        Request(prompt="Once", mode="speculative", policy=ThresholdPolicy(threshold=5.0, max_deferred=0), max_tokens=2),
    ):
        assert len(engine.generate([request])[0][0].tokens) == 2
