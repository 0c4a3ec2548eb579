"""Requests under a certificate, from HTTP to the exit log: settings they leave out, what they hear, their audits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_ee.inference.certificate import Calibration
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Completion
from megatron_ee.serving.exit_log import read_logs
from megatron_ee.serving.exit_record import ExitRecord

QUESTION = {"messages": [{"role": "user", "content": "hello"}]}
POLICY = {"name": "threshold", "threshold": 2.0, "thresholds": {1: 0.3, 2: 0.3}}


@pytest.fixture
def certified(
    serve: Callable[..., contextlib.AbstractContextManager[Any]], calibrate: Callable[..., Calibration]
) -> Iterator[Any]:
    """A server whose only task has a certificate, and all of whose requests under it are audited."""
    calibration = calibrate(policy=POLICY, full_layers=4, risk=0.9)
    with serve(calibrations=[calibration], audits=1.0) as found:
        yield found


def records(server: Any, count: int) -> list[ExitRecord]:
    until = time.monotonic() + 60
    while len(found := list(read_logs([server.log]))) < count:
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def test_the_answer_and_the_log_say_what_is_certified(certified: Any, alone: Callable[..., Completion]) -> None:
    chat = certified.post("/v1/chat/completions", QUESTION).json()  # temperature and length are the certificate's
    ids = tuple(certified.service.tokenizer.encode_spans("user: hello\nassistant: ")[0])
    policy = ThresholdPolicy(**{key: value for key, value in POLICY.items() if key != "name"})
    early = alone(prompt=ids, max_tokens=32, mode="threshold", policy=policy, exits=(1, 2))
    assert chat["choices"][0]["message"]["content"] == early.text
    assert chat["early_exit"]["calibration"] == {
        **{"status": "certified", "task": "inquiries", "certificate": "a" * 64},
        "reason": None,
    }
    warm = certified.post("/v1/chat/completions", {**QUESTION, "temperature": 1}).json()
    assert warm["early_exit"]["mode"] == "full"
    assert warm["early_exit"]["calibration"]["status"] == "full"
    assert warm["early_exit"]["reason"].startswith("temperature: 1")
    important = certified.post("/v1/chat/completions", QUESTION, **{"X-Priority": "important"}).json()
    assert (important["early_exit"]["mode"], important["early_exit"]["tier"]) == ("full", "important")
    full = alone(prompt=ids, max_tokens=32)
    assert important["choices"][0]["message"]["content"] == full.text

    found = sorted(records(certified, 3), key=lambda record: record.number)
    assert [record.calibration and record.calibration.status for record in found] == ["certified", "full", "full"]
    assert found[0].audit is not None and found[0].audit.certificate == "a" * 64
    assert found[0].audit.loss == (early.tokens != full.tokens and early.text != full.text)
    assert found[1].audit is None and found[2].audit is None
    metrics = certified.plain.get("/metrics").text
    assert 'megatron_ee:audits_total{task="inquiries"} 1.0' in metrics
    assert 'megatron_ee:drift_audits{certificate="aaaaaaaaaaaa",task="inquiries"} 1.0' in metrics
    exits = certified.plain.get("/v1/exits").json()
    assert exits["rules"]["tasks"]["inquiries"]["certificate"]["sha256"] == "a" * 64
    assert exits["audits"]["inquiries"]["audits"] == 1


def test_thresholds_of_its_own_need_a_word(certified: Any) -> None:
    body = {**QUESTION, "max_tokens": 4, "early_exit": {"threshold": 0.3}}
    refused = certified.post("/v1/chat/completions", body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "early_exit.threshold"
    body["early_exit"]["uncertified"] = True
    answer = certified.post("/v1/chat/completions", body).json()
    assert answer["early_exit"]["calibration"]["status"] == "uncertified"


def test_a_prompt_under_a_certificate_is_scored_in_full_mode(certified: Any, alone: Callable[..., Completion]) -> None:
    body = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0}
    scores = certified.post("/v1/completions", body).json()["choices"][0]["logprobs"]["token_logprobs"]
    ids = certified.service.tokenizer.encode("abc")
    full = alone(prompt=(0,), forced_ids=tuple(ids), max_tokens=3, logprobs=0)
    assert scores[1:] == pytest.approx([token.logprobs.forced for token in full.tokens], abs=1e-4)  # type: ignore[union-attr]
