from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_ee.errors import ConfigError
from megatron_ee.inference.policy import ExitPolicy, confidences


def test_the_cap_holds_the_next_token_back() -> None:
    policy = ExitPolicy(0.5, max_deferred=3)
    assert [policy.may_leave(9, since) for since in range(5)] == [True, True, True, False, False]
    assert not ExitPolicy(0.5, max_deferred=0).may_leave(9, 0)


def test_the_first_tokens_run_all_layers() -> None:
    assert [ExitPolicy(0.5, min_full=3).may_leave(emitted, 0) for emitted in range(5)] == [False] * 3 + [True] * 2
    assert [ExitPolicy(0.5).may_leave(emitted, 0) for emitted in range(3)] == [False, True, True]


def test_an_exit_rests_the_longer_the_more_have_stayed() -> None:
    policy = ExitPolicy(0.5, patience=3)
    assert [policy.rest(stayed) for stayed in (0, 1, 2, 3, 4, 5, 6, 7, 99)] == [0, 0, 0, 1, 3, 7, 15, 15, 15]
    assert [ExitPolicy(0.5, patience=0).rest(stayed) for stayed in (0, 1, 99)] == [0, 0, 0]


def test_an_exit_may_have_its_own_threshold() -> None:
    policy = ExitPolicy(0.5, {2: 0.7, 9: 1.5})
    assert [policy.at(layer) for layer in (1, 2, 9, 10)] == [0.5, 0.7, 1.5, 0.5]


def test_measures() -> None:
    shares = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    logits = shares.log() + torch.tensor([[3.0], [-4.0], [0.0]])  # what is added to all of them does not count
    assert confidences(logits, "probability").tolist() == pytest.approx([0.5, 0.25, 0.97])
    assert confidences(logits, "margin").tolist() == pytest.approx([0.25, 0.0, 0.96], abs=1e-6)
    # 1.75 and 2 of at most 2 bits
    entropy = confidences(logits, "entropy").tolist()
    assert entropy[:2] == pytest.approx([1 - 1.75 / 2, 0.0], abs=1e-6)
    assert entropy[2] == pytest.approx(1 + (0.97 * math.log2(0.97) + 0.03 * math.log2(0.01)) / 2)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"threshold": 0}, "threshold: must be a number above 0, not 0; above 1 no token leaves early"),
        ({"threshold": math.nan}, "threshold: must be a number above 0, not nan"),
        ({"threshold": math.inf}, "threshold: must be a number above 0, not inf"),
        ({"threshold": True}, "threshold: must be a number above 0, not True"),
        ({"threshold": "0.5"}, "threshold: must be a number above 0, not '0.5'"),
        ({"threshold": 10**400}, "threshold: must be a number above 0"),
        ({"thresholds": {2: -1.0}}, "thresholds: that of the exit after layer 2 must be a number above 0, not -1.0"),
        ({"thresholds": [(2, 0.5)]}, "thresholds: must give thresholds by layer"),
        ({"measure": "hope"}, "measure: 'hope' is unknown; possible: probability, margin, entropy"),
        ({"max_deferred": -1}, "max_deferred: must be a whole number from 0 to 255, not -1"),
        ({"max_deferred": 256}, "max_deferred: must be a whole number from 0 to 255, not 256"),
        ({"max_deferred": 1.5}, "max_deferred: must be a whole number from 0 to 255, not 1.5"),
        ({"max_deferred": None}, "max_deferred: must be a whole number from 0 to 255, not None"),
        ({"min_full": 0}, "min_full: must be a whole number, 1 or more, not 0"),
        ({"patience": -1}, "patience: must be a whole number, 0 or more, not -1; 0 asks exits always"),
        ({"patience": 2.0}, "patience: must be a whole number, 0 or more, not 2.0; 0 asks exits always"),
        ({"min_full": "2"}, "min_full: must be a whole number, 1 or more, not '2'"),
    ],
)
def test_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExitPolicy(**fields).check()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
