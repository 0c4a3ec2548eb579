from __future__ import annotations

import pytest
import torch

from megatron_ee.inference.policy import ExitPolicy


@pytest.mark.parametrize("confidence, leaves", [(0.79, False), (0.8, True), (0.81, True)])
def test_a_token_leaves_at_the_threshold_and_above(confidence: float, leaves: bool) -> None:
    assert ExitPolicy(0.8).leaves(torch.tensor([confidence])) is leaves


def test_the_threshold_is_compared_in_the_confidences_dtype() -> None:
    assert torch.tensor(0.9).item() < 0.9
    assert ExitPolicy(0.9).leaves(torch.tensor(0.9))


def test_above_one_none_leaves() -> None:
    assert ExitPolicy(1.0).leaves(torch.tensor(1.0))
    assert not ExitPolicy(1.01).leaves(torch.tensor(1.0))


def test_the_cap_holds_the_next_token_back() -> None:
    policy = ExitPolicy(0.5, max_deferred=3)
    assert [policy.may_leave(deferred) for deferred in range(5)] == [True, True, True, False, False]
    assert not ExitPolicy(0.5, max_deferred=0).may_leave(0)
