"""Tests by betting: fair under the null hypothesis, and stronger than what they replace."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ee.evaluation.calibration.betting import betting_p, horizon_bets, kl

SAMPLES = 2000


def losses_with_mean(kind: str, mean: float, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    source = np.random.default_rng(seed)
    if kind == "binary":
        return (source.random(shape) < mean).astype(float)
    if kind == "graded":  # some losses, of every size
        return np.where(source.random(shape) < 2 * mean, source.random(shape), 0.0)
    return source.beta(20 * mean, 20 * (1 - mean), shape)  # every loss is close to the mean


def binomial_margin(level: float) -> float:
    """Three standard deviations of a share of ``SAMPLES``."""
    return 3 * float(np.sqrt(level * (1 - level) / SAMPLES))


@pytest.mark.parametrize("kind", ["binary", "graded", "narrow"])
@pytest.mark.parametrize(("mean", "count"), [(0.05, 200), (0.3, 50)])
def test_the_p_value_of_a_true_null_hypothesis_is_small_no_more_often_than_it_says(
    kind: str, mean: float, count: int
) -> None:
    p = betting_p(losses_with_mean(kind, mean, (SAMPLES, count)), mean, 0.1)
    for level in (0.02, 0.1, 0.3):
        assert (p <= level).mean() <= level + binomial_margin(level)


def test_a_bet_depends_on_earlier_losses_only_and_cannot_lose_more_than_there_is() -> None:
    losses = losses_with_mean("graded", 0.2, (40,))
    changed = losses.copy()
    changed[25:] = 1 - changed[25:]
    bets = horizon_bets(losses, 0.2, 0.1)
    np.testing.assert_array_equal(bets[:26], horizon_bets(changed, 0.2, 0.1)[:26])
    assert (bets >= 0).all()
    assert (bets <= 1 / 0.8).all()


def test_it_passes_wherever_hoeffdings_does_for_losses_of_zero_or_one() -> None:
    mean, delta, count = 0.1, 0.05, 300
    stronger = 0
    for rate in (0.03, 0.05, 0.06, 0.07):
        losses = losses_with_mean("binary", rate, (500, count))
        observed = losses.mean(axis=-1)
        hoeffding = np.exp(-count * kl(np.minimum(observed, mean), mean)) <= delta
        betting = betting_p(losses, mean, delta) <= delta
        assert not (hoeffding & ~betting).any()
        stronger += int((betting & ~hoeffding).sum())
    assert stronger > 100


def test_losses_that_vary_little_pass_with_far_fewer_of_them() -> None:
    losses = losses_with_mean("narrow", 0.07, (200, 200))
    assert (betting_p(losses, 0.1, 0.1) <= 0.1).mean() > 0.9
    binary = losses_with_mean("binary", 0.07, (200, 200))
    assert (betting_p(binary, 0.1, 0.1) <= 0.1).mean() < 0.6


def test_a_single_loss_of_one_can_take_all_and_the_wealth_before_it_counts() -> None:
    losses = np.zeros(29)
    assert 0.9**29 <= betting_p(losses, 0.1, 0.05) <= 0.05  # 29 is the smallest number that can pass
    losses[-1] = 1.0
    assert 0.9**28 <= betting_p(losses, 0.1, 0.05) <= 0.06
    assert betting_p(losses[:0], 0.1, 0.05) == 1.0
