from __future__ import annotations

import json
import math
from typing import Any, Literal

import pytest
import torch

from megatron_ee.config.validation import validated
from megatron_ee.errors import ConfigError
from megatron_ee.inference.policy import (
    MEASURES,
    POLICIES,
    ExitHistory,
    ExitPolicy,
    ThresholdPolicy,
    backoff_length,
    policy_from_json,
)


def asked(policy: ExitPolicy, index: int = 9, num_left: int = 0) -> bool:
    return policy.exits_to_ask((2, 4), index, ExitHistory(num_left)) == (2, 4)


def test_after_max_deferred_no_exit_is_asked() -> None:
    policy = ThresholdPolicy(max_deferred=3)
    assert [asked(policy, num_left=left) for left in range(5)] == [True, True, True, False, False]
    assert not asked(ThresholdPolicy(max_deferred=0))


def test_the_first_tokens_run_all_layers() -> None:
    assert [asked(ThresholdPolicy(min_full=3), index) for index in range(5)] == [False] * 3 + [True] * 2
    assert [asked(ThresholdPolicy(), index) for index in range(3)] == [False, True, True]


def test_an_exit_is_asked_less_the_more_tokens_have_stayed() -> None:
    assert [backoff_length(count, 3) for count in (0, 1, 2, 3, 4, 5, 6, 7, 99)] == [0, 0, 0, 1, 3, 7, 15, 15, 15]
    assert [backoff_length(count, 0) for count in (0, 1, 99)] == [0, 0, 0]
    policy, history, found = ThresholdPolicy(backoff=2), ExitHistory(), []
    for index in range(1, 14):
        layers = policy.exits_to_ask((2, 4), index, history)
        found.append(layers)
        for layer in layers:
            history.stayed(layer, index)
    assert [index for index, layers in enumerate(found, start=1) if layers] == [1, 2, 4, 8]
    history.left(2, early=True)
    assert policy.exits_to_ask((2, 4), 14, history) == (2,) and history.num_left == 1


def test_a_token_that_asks_again_after_preemption_counts_once() -> None:
    history = ExitHistory()
    for index in (5, 5, 6):
        history.stayed(2, index)
    assert history.stays == {2: (2, 6)}


def test_an_exit_may_have_its_own_threshold() -> None:
    policy = ThresholdPolicy(threshold=0.5, thresholds={2: 0.7, 9: 1.5})
    assert [policy.leaves(layer, 0.6) for layer in (1, 2, 9, 10)] == [True, False, False, True]
    assert not ThresholdPolicy(threshold=1e-300).leaves(1, math.nan)


def test_thresholds_are_compared_in_float32() -> None:
    confidence = float(torch.tensor(0.1))
    assert confidence > 0.1 and ThresholdPolicy(threshold=0.1).leaves(1, confidence)
    below = float(torch.nextafter(torch.tensor(0.3), torch.tensor(0.0)))
    assert not ThresholdPolicy(threshold=0.3).leaves(1, below)


def test_json_form() -> None:
    policy = ThresholdPolicy(threshold=0.3, thresholds={2: 0.7}, measure="margin", max_deferred=3, backoff=0)
    form = json.loads(json.dumps(policy.model_dump(mode="json")))
    assert form["name"] == "threshold" and policy_from_json(form) == policy
    assert policy_from_json({"threshold": 0.5}) == ThresholdPolicy(threshold=0.5)
    for wrong, message in (
        ({"name": "hope"}, "name: must be one of threshold, gate, not 'hope'"),
        ({"name": "threshold", "luck": 1}, "luck: unknown key"),
        (["threshold"], "must be an object with the name of a policy"),
    ):
        with pytest.raises(ConfigError) as caught:
            policy_from_json(wrong)
        assert str(caught.value).startswith(message)


class EveryOther(ExitPolicy):
    name: Literal["every_other"] = "every_other"
    start: int

    def leaves(self, layer: int, confidence: float) -> bool:
        return layer >= self.start


def test_a_policy_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "every_other", EveryOther)
    assert policy_from_json({"name": "every_other", "start": 4}) == EveryOther(start=4)
    with pytest.raises(ConfigError, match="^start: missing$"):
        policy_from_json({"name": "every_other"})


def test_measures() -> None:
    shares = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    logits = shares.log() + torch.tensor([[3.0], [-4.0], [0.0]])  # what is added to all of them does not count
    assert MEASURES["probability"](logits).tolist() == pytest.approx([0.5, 0.25, 0.97])
    assert MEASURES["margin"](logits).tolist() == pytest.approx([0.25, 0.0, 0.96], abs=1e-6)
    # 1.75 and 2 of at most 2 bits
    entropy = MEASURES["entropy"](logits).tolist()
    assert entropy[:2] == pytest.approx([1 - 1.75 / 2, 0.0], abs=1e-6)
    assert entropy[2] == pytest.approx(1 + (0.97 * math.log2(0.97) + 0.03 * math.log2(0.01)) / 2)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"threshold": 0}, "threshold: must be above 0, not 0"),
        ({"threshold": math.nan}, "threshold: must be a finite number, not nan"),
        ({"threshold": math.inf}, "threshold: must be a finite number, not inf"),
        ({"threshold": True}, "threshold: must be a number, not True"),
        ({"threshold": "0.5"}, "threshold: must be a number, not '0.5'"),
        ({"threshold": 10**400}, "threshold: must be "),
        ({"thresholds": {2: -1.0}}, "thresholds[2]: must be above 0, not -1.0"),
        ({"thresholds": {"x": 1.0}}, "thresholds"),
        ({"thresholds": {"2": 0.5, "02": 0.6}}, "thresholds: names a layer twice: ['2', '02']"),
        ({"thresholds": [(2, 0.5)]}, "thresholds: must be an object, not"),
        ({"measure": "hope"}, "measure: must be one of probability, margin, entropy, not 'hope'"),
        ({"max_deferred": -1}, "max_deferred: must be at least 0, not -1"),
        ({"max_deferred": 256}, "max_deferred: must be at most 255, not 256"),
        ({"max_deferred": 1.5}, "max_deferred: must be a whole number, not 1.5"),
        ({"max_deferred": None}, "max_deferred: must be a whole number, not None"),
        ({"min_full": 0}, "min_full: must be at least 1, not 0"),
        ({"min_full": "2"}, "min_full: must be a whole number, not '2'"),
        ({"backoff": -1}, "backoff: must be at least 0, not -1"),
        ({"backoff": 2.0}, "backoff: must be a whole number, not 2.0"),
        ({"patience": 2}, "patience: unknown key"),
        ({1: 2}, "[1]: must be a key that is text, not 1"),
    ],
)
def test_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(ThresholdPolicy, fields)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
