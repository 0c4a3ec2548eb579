"""Requests that cannot be answered are refused in one line that names the field."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import ConfigError
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.assembly import make_engine
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.inference.requests import MAX_DRAFT, MAX_LOGPROBS, Draft, Request
from megatron_ee.inference.sampling import Sampling

EXITS = [ExitSpec(1), ExitSpec(2, "norm"), ExitSpec(4, "norm")]
SPECULATIVE: dict[str, Any] = {"mode": "speculative"}
THRESHOLD: dict[str, Any] = {"mode": "threshold"}


@pytest.fixture(scope="module")
def engine(byte_model: Path, load_stage: Callable[..., Stage]) -> Engine:
    return make_engine(load_stage(byte_model, EXITS), tokenizer=load_tokenizer(byte_model))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt: is empty; give text to continue"),
    ({"prompt": []}, "prompt: is empty; give text to continue"),
    ({"prompt": "x" * 63}, "prompt: has 64 tokens, but the model has 64 positions; shorten it"),
    ({"prompt": [3, 258]}, "prompt: token ids must be whole numbers from 0 to 257"),
    ({"prompt": [3, -1]}, "prompt: token ids must be whole numbers from 0 to 257"),
    ({"prompt": [3, True]}, "prompt: token ids must be whole numbers from 0 to 257"),
    ({"prompt": [3, 1.0]}, "prompt: token ids must be whole numbers from 0 to 257"),
    ({"prompt": None}, "prompt: must be text or token ids, not None"),
    ({"prompt": 7}, "prompt: must be text or token ids, not 7"),
    ({"prompt": "a\ud800b"}, "prompt: is no text that can be encoded"),
    ({"mode": "fast"}, "mode: 'fast' is unknown; possible: full, threshold, speculative"),
    ({"mode": None}, "mode: None is unknown"),
    ({"policy": ExitPolicy(0.0), **THRESHOLD}, "threshold: must be a number above 0"),
    ({"policy": ExitPolicy(math.nan)}, "threshold: must be a number above 0"),
    ({"policy": ExitPolicy(0.5, {3: 0.5})}, "thresholds: there is no exit after layer 3; there are: 1, 2, 4"),
    ({"policy": ExitPolicy(0.5, {"1": 0.5})}, "thresholds: there is no exit after layer '1'; there are: 1, 2, 4"),
    ({"policy": ExitPolicy(0.5, {1: -0.5})}, "thresholds: that of the exit after layer 1 must be a number above 0"),
    ({"policy": ExitPolicy(0.5, measure="luck")}, "measure: 'luck' is unknown"),  # type: ignore[arg-type]
    ({"policy": ExitPolicy(0.5, max_deferred=-1)}, "max_deferred: must be a whole number from 0 to 255, not -1"),
    ({"policy": ExitPolicy(0.5, min_full=0)}, "min_full: must be a whole number, 1 or more, not 0"),
    ({"exits": (1, 3)}, "exits: there is no exit after layer 3; there are: 1, 2, 4"),
    ({"exits": (), **THRESHOLD}, "exits: mode threshold needs at least one"),
    ({"exits": (4,), **SPECULATIVE}, "exits: none before the last layer is enabled, so that nothing can draft"),
    ({"exits": 1}, "exits: must be a list, not 1"),
    ({"draft": Draft(exit=3), **SPECULATIVE}, "draft.exit: there is no exit after layer 3; there are: 1, 2"),
    (
        {"draft": Draft(exit=4), **SPECULATIVE},
        "draft.exit: the exit after layer 4 reads the last layer, so that its drafts would spare nothing; exits that "
        "can draft: 1, 2",
    ),
    ({"draft": Draft(exit=4)}, "draft.exit: the exit after layer 4 reads the last layer"),
    ({"draft": Draft(exit=3)}, "draft.exit: there is no exit after layer 3; there are: 1, 2"),
    ({"draft": Draft(length=99), "mode": "threshold"}, "draft.length: must be a whole number from 0 to"),
    ({"ignore_eos": 1}, "ignore_eos: must be true or false, not 1"),
    ({"exits": (True,)}, "exits: there is no exit after layer True; there are: 1, 2, 4"),
    (
        {"draft": Draft(exit=1), "exits": (2,), **SPECULATIVE},
        "draft.exit: there is no exit after layer 1; there are: 2",
    ),
    ({"draft": Draft(length=-1), **SPECULATIVE}, f"draft.length: must be a whole number from 0 to {MAX_DRAFT}, not -1"),
    ({"draft": Draft(length=MAX_DRAFT + 1), **SPECULATIVE}, "draft.length: must be a whole number from 0 to"),
    ({"draft": Draft(length=1.0), **SPECULATIVE}, "draft.length: must be a whole number from 0 to"),  # type: ignore[arg-type]
    ({"sampling": Sampling(temperature=-1)}, "temperature: must"),
    ({"sampling": Sampling(top_p=0)}, "top_p: must"),
    ({"sampling": Sampling(seed=-1)}, "seed: must"),
    ({"samples": 0}, "samples: must be a whole number from 1 to 128, not 0"),
    ({"samples": 129}, "samples: must be a whole number from 1 to 128, not 129"),
    ({"samples": 2, "sampling": Sampling(seed=2**63 - 1)}, "seed: must leave room for 2 samples"),
    ({"max_tokens": 0}, "max_tokens: must be a whole number at least 1, not 0"),
    ({"max_tokens": 2.5}, "max_tokens: must be a whole number at least 1, not 2.5"),
    ({"max_tokens": True}, "max_tokens: must be a whole number at least 1, not True"),
    ({"logprobs": -1}, f"logprobs: must be a whole number from 0 to {MAX_LOGPROBS}, not -1"),
    ({"logprobs": MAX_LOGPROBS + 1}, "logprobs: must be a whole number from 0 to"),
    ({"stop": "END"}, "stop: must be a list, not 'END'"),
    ({"stop": ["END", ""]}, "stop: must be a list of texts that are not empty"),
    ({"stop": [3]}, "stop: must be a list of texts that are not empty"),
    ({"stop": None}, "stop: must be a list, not None"),
    ({"stop_ids": ["x"]}, "stop_ids: token ids must be whole numbers from 0 to 257"),
    ({"stop_ids": [258]}, "stop_ids: token ids must be whole numbers from 0 to 257"),
    ({"stop_ids": 5}, "stop_ids: must be a list, not 5"),
    ({"follow": [3, 258]}, "follow: token ids must be whole numbers from 0 to 257"),
    ({"follow": [3], **SPECULATIVE}, "follow: proposals cannot be verified on a text that is given; use another mode"),
    ({"follow": "text"}, "follow: must be a list, not 'text'"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[f"{i}: {next(iter(c))}" for i, (c, _) in enumerate(REFUSED)])
def test_refuses(changes: dict[str, Any], message: str, engine: Engine) -> None:
    request = Request(**{"prompt": "Once", "max_tokens": 3, **changes})
    with pytest.raises(ConfigError) as caught:
        engine.submit(request)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert engine.idle


def test_every_field_is_refused_somewhere() -> None:
    touched = {name for changes, _ in REFUSED for name in changes}
    assert touched >= {field.name for field in fields(Request)} - {"ignore_eos", "echo"}


def test_others_go_on_while_some_are_refused(engine: Engine) -> None:
    fine = Request("Once", max_tokens=30)
    [[alone]] = engine.generate([fine])
    number = engine.submit(fine)
    tokens: list[Any] = []
    for changes, _ in REFUSED:
        with pytest.raises(ConfigError):
            engine.submit(replace(fine, **changes))
        tokens += [token for event in engine.step() for token in event.tokens]
    tokens += [token for event in engine.stream(number) for token in event.tokens]
    assert tuple(tokens) == alone.tokens and engine.idle


@pytest.mark.parametrize("mode", ["threshold", "speculative"])
def test_modes_that_need_exits(mode: Any, byte_model: Path, load_stage: Callable[..., Stage]) -> None:
    engine = make_engine(load_stage(byte_model))
    with pytest.raises(ConfigError, match=f"^mode: {mode} needs exits; give their adapter$"):
        engine.submit(Request([5], mode))
    assert len(engine.generate([Request([5], max_tokens=2)])[0][0].tokens) == 2


def test_what_has_no_part_in_a_mode_does_not_hinder_it(engine: Engine) -> None:
    for request in (
        Request("Once", exits=(), max_tokens=2),
        Request("Once", draft=Draft(2, 3), max_tokens=2),
        Request("Once", "threshold", draft=Draft(2, 3), max_tokens=2),
        Request("Once", "speculative", ExitPolicy(5.0, max_deferred=0), max_tokens=2),
    ):
        assert len(engine.generate([request])[0][0].tokens) == 2
