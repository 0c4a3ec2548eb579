"""p-values and tests in a fixed sequence: what they say of exits whose risk is known."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ee.evaluation.calibration.betting import betting_p
from megatron_ee.evaluation.calibration.pvalues import (
    P_VALUES,
    fixed_sequence,
    hoeffding_bentkus_p,
    largest_risk,
    passing,
    smallest_count,
)
from megatron_ee.inference.certificate import PValue

TRIALS = 1000
RISKS = np.array([0.0, 0.02, 0.05, 0.08, 0.1001, 0.13, 0.2, 0.4])
"""Expected loss of each setting, from safe to fast. The first that must not pass is hardly above the tested risk."""
RISK, DELTA = 0.1, 0.1


def test_a_setting_passes_by_scope_or_for_all_together() -> None:
    p_values = {"a": 0.05, "b": 0.2, "c": float("nan")}
    assert passing(p_values, 0.1) == ["a"] and passing(p_values, 0.1, together=True) == []
    assert passing({"a": 0.05, "b": 0.1}, 0.1, together=True) == ["a", "b"]


def draw_losses(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Losses of synthetic exits with the expected losses ``RISKS``, ``[trials, settings, count]``.

    A sequence has one difficulty for all settings, as it has in a model.
    """
    source = np.random.default_rng(seed)
    difficulty = source.random((TRIALS, 1, count))
    if kind == "binary":
        return (difficulty < RISKS[:, None]).astype(float)
    sizes = source.beta(4.0, 4.0, (TRIALS, 1, count))  # with mean 1 / 2
    return np.where(difficulty < 2 * RISKS[:, None], sizes, 0.0)


def accepted(losses: np.ndarray, name: PValue) -> np.ndarray:
    """Number of settings that pass in each trial."""
    p = P_VALUES[name](losses, RISK, DELTA)
    return np.array([fixed_sequence(row, DELTA) for row in p])


@pytest.mark.parametrize("name", P_VALUES)
@pytest.mark.parametrize("kind", ["binary", "graded"])
@pytest.mark.parametrize("count", [50, 200, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_risk_is_violated_in_at_most_delta_of_the_calibrations(name: PValue, kind: str, count: int) -> None:
    passed = accepted(draw_losses(kind, count), name)
    safe = int((RISKS <= RISK).sum())
    violations = (passed > safe).mean()
    assert violations <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / TRIALS)
    if count >= 200:  # where something is to be gained, it is
        assert (passed >= 3).mean() > 0.5


@pytest.mark.parametrize("name", P_VALUES)
def test_a_first_setting_above_the_risk_passes_with_probability_delta_at_most(name: PValue) -> None:
    losses = (np.random.default_rng(1).random((4000, 200)) < RISK).astype(float)
    passed = (P_VALUES[name](losses, RISK, DELTA) <= DELTA).mean()
    assert passed <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / 4000)
    if name == "betting":  # it uses up most of what it may
        assert passed > DELTA / 3


def test_betting_accepts_at_least_as_fast_settings_as_hoeffding_bentkus() -> None:
    for kind in ("binary", "graded"):
        losses = draw_losses(kind, 200)
        betting, other = accepted(losses, "betting"), accepted(losses, "hoeffding-bentkus")
        assert betting.mean() >= other.mean()
    assert betting.mean() > other.mean() + 0.3  # graded losses vary less


@pytest.mark.parametrize("name", P_VALUES)
@pytest.mark.parametrize(("risk", "delta"), [(0.02, 0.1), (0.1, 0.05), (0.5, 0.25), (0.001, 0.01), (0.9, 0.5)])
def test_the_smallest_sample_is_the_smallest(name: PValue, risk: float, delta: float) -> None:
    count = smallest_count(name, risk, delta)
    assert P_VALUES[name](np.zeros(count), risk, delta) <= delta
    assert count == 1 or P_VALUES[name](np.zeros(count - 1), risk, delta) > delta


def test_hoeffding_bentkus_has_the_published_values() -> None:
    # exp(-100 kl(0.02, 0.1)) and e * P(Binomial(100, 0.1) <= 2)
    assert hoeffding_bentkus_p([1.0] * 2 + [0.0] * 98, 0.1) == pytest.approx(
        min(np.exp(-100 * (0.02 * np.log(0.2) + 0.98 * np.log(0.98 / 0.9))), np.e * 0.0019448847), rel=1e-6
    )
    assert hoeffding_bentkus_p([1.0] * 20 + [0.0] * 80, 0.1) == 1.0
    assert hoeffding_bentkus_p([], 0.1) == 1.0


@pytest.mark.parametrize("name", P_VALUES)
@pytest.mark.parametrize("loss", [1.5, -0.1, float("nan")])
def test_losses_outside_the_unit_interval_are_refused(name: PValue, loss: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        P_VALUES[name]([0.1, loss], 0.1, 0.1)


def test_nothing_is_computed_after_the_first_setting_that_fails() -> None:
    seen = []

    def p_values():
        for p in (0.01, 0.05, 0.2, 0.0):
            seen.append(p)
            yield p

    assert fixed_sequence(p_values(), 0.05) == 2
    assert seen == [0.01, 0.05, 0.2]
    assert fixed_sequence([float("nan")], 0.5) == 0


@pytest.mark.parametrize("name", P_VALUES)
def test_the_upper_bound_holds_the_mean_and_shrinks(name: PValue) -> None:
    source = np.random.default_rng(2)
    bounds = [largest_risk(name, (source.random(count) < 0.1).astype(float), 0.1) for count in (30, 300)]
    assert 0.05 < bounds[1] < bounds[0] < 1
    assert largest_risk(name, np.zeros(100), 0.1) == pytest.approx(1 - 0.1 ** (1 / 100), abs=2e-3)


def test_no_value_above_the_upper_bound_is_plausible() -> None:
    """The p-value of betting may rise with the tested mean, so that a bisection can end below a plausible value."""
    losses = np.random.default_rng(17).permutation(np.repeat([0.5, 1.0], 100))
    risks = np.arange(70, 100) / 100
    plausible = np.array([betting_p(losses, risk, 0.1) > 0.1 for risk in risks.tolist()])
    assert (np.diff(plausible.astype(int)) > 0).any()
    assert largest_risk("betting", losses, 0.1) > risks[plausible].max()
