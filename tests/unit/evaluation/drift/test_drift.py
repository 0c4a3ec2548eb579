"""Drift: error rates and speed of both tests over simulated streams, and a state that goes on after a restart."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_ee.config.validation import validated
from megatron_ee.errors import ConfigError
from megatron_ee.evaluation.drift.monitor import (
    DriftMonitor,
    bet_once,
    fixed_bets,
    mixed_log_wealth,
    mixed_sum,
    new_monitor,
    run_monitor,
)

RISK, STREAMS, AUDITS = 0.05, 1000, 1000
Losses = NDArray[np.float64]


def alarms(losses: Losses, risk: float, level: float) -> tuple[NDArray[np.int64], ...]:
    """Audit of the first alarm of the test from the start and of the restarting one, from 1, or 0 for none; and the
    number of the latter's alarms. All are ``[streams]``."""
    bets = fixed_bets(risk)
    wealths = sums = np.zeros((len(losses), len(bets)))
    start = restart = count = np.zeros(len(losses), np.int64)
    for at, column in enumerate(losses.T, start=1):
        wealths, sums = bet_once(wealths, sums, column, bets, risk)
        start = np.where((start == 0) & (mixed_log_wealth(wealths) >= -math.log(level)), at, start)
        again = mixed_sum(sums) >= 1 / level
        restart, count = np.where((restart == 0) & again, at, restart), count + again
        sums = np.where(again[:, None], 0.0, sums)
    return start, restart, count


def zeros_and_ones(rng: np.random.Generator) -> Losses:
    return (rng.random((STREAMS, AUDITS)) < RISK).astype(float)


def continuous(rng: np.random.Generator) -> Losses:
    return rng.beta(2 * RISK, 2 * (1 - RISK), (STREAMS, AUDITS))


def partial(rng: np.random.Generator) -> Losses:
    return 0.2 * (rng.random((STREAMS, AUDITS)) < 5 * RISK)


def clustered(rng: np.random.Generator) -> Losses:
    """The mean given the past is always the risk, but most losses come shortly after others."""
    losses = np.empty((STREAMS, AUDITS))
    wild = np.ones(STREAMS, bool)
    for at in range(AUDITS):
        hit, change = rng.random((2, STREAMS))
        losses[:, at] = np.where(wild, hit < RISK, RISK * (0.9 + 0.2 * hit))
        wild = np.where(losses[:, at] == 1, True, change < np.where(wild, 0.9, 0.05))
    return losses


def below_the_risk(rng: np.random.Generator) -> Losses:
    """The mean given the past is the risk, and half of it for ten audits after each loss."""
    losses, calm = np.empty((STREAMS, AUDITS)), np.zeros(STREAMS, np.int64)
    for at in range(AUDITS):
        losses[:, at] = rng.random(STREAMS) < np.where(calm > 0, RISK / 2, RISK)
        calm = np.where(losses[:, at] == 1, 10, calm - 1)
    return losses


@pytest.mark.parametrize("level", [0.01, 0.05])
@pytest.mark.parametrize("make", [zeros_and_ones, continuous, partial, clustered, below_the_risk])
def test_false_alarms_are_as_rare_as_promised(make: Callable[[np.random.Generator], Losses], level: float) -> None:
    losses = make(np.random.default_rng(0))
    start, restart, count = alarms(losses, RISK, level)
    margin = 3 * math.sqrt(STREAMS * level * (1 - level))
    assert np.count_nonzero(start) <= STREAMS * level + margin
    # The time of a stream without an alarm is cut, which makes the mean smaller.
    assert np.where(restart, restart, AUDITS).mean() >= 1 / level
    assert count.mean() <= AUDITS * level


def test_a_shift_is_found_soon() -> None:
    rng, good = np.random.default_rng(1), 500
    before = rng.random((STREAMS, good)) < 0.2 * RISK
    after = rng.random((STREAMS, 150)) < 5 * RISK
    _, restart, _ = alarms(np.concatenate([before, after], axis=1).astype(float), RISK, 0.01)
    calm = restart > good
    assert calm.mean() > 0.85  # the risk is kept, by far: false alarms are rarer than promised
    assert np.mean(restart[calm] <= good + 60) > 0.95
    start, *_ = alarms(after.astype(float), RISK, 0.01)
    assert np.mean((start > 0) & (start <= 75)) > 0.95


@pytest.mark.parametrize("risk", [1e-4, 0.02, 0.3, 0.5, 0.9])
def test_bets_leave_some_wealth_whatever_comes(risk: float) -> None:
    bets = fixed_bets(risk)
    assert np.all(bets > 0) and np.all(bets < 1 / risk) and np.all(np.diff(bets) > 0) and len(bets) <= 15
    assert np.all(1 + bets * (0 - risk) > 0)


def test_wealth_by_hand() -> None:
    bets = fixed_bets(0.1)
    history = run_monitor(new_monitor(0.1), [1.0, 0.0])
    one = 1 + bets * 0.9
    two = one * (1 - bets * 0.1)
    assert np.exp(history.log_wealths) == pytest.approx([one.mean(), two.mean()])
    sums = (one, (1 + one) * (1 - bets * 0.1))
    assert history.detectors == pytest.approx([each.mean() for each in sums])
    assert history.monitor.mean_loss == 0.5 and history.monitor.p_value == pytest.approx(1 / one.mean())


def test_a_monitor_does_what_the_simulations_do_and_goes_on_after_its_json_form() -> None:
    rng = np.random.default_rng(2)
    losses = np.concatenate([rng.random(200) < 0.01, rng.random(200) < 0.3]).astype(float)
    start, restart, count = alarms(losses[None], RISK, 0.01)
    monitor = new_monitor(RISK)
    for loss in losses[:250]:
        monitor = monitor.updated(float(loss))
    monitor = DriftMonitor.model_validate_json(monitor.model_dump_json())
    for loss in losses[250:]:
        monitor = monitor.updated(float(loss))
    history = run_monitor(new_monitor(RISK), losses.tolist())
    assert monitor == history.monitor
    assert monitor.alarm == start[0] > 200 and history.restarts[0] == restart[0] > 200
    assert monitor.restarts == len(history.restarts) == count[0] > 1 and monitor.last_restart == history.restarts[-1]
    assert history.detectors[restart[0] - 1] == 100 > history.detectors[restart[0]]
    assert len(monitor.model_dump_json()) < 1000


def test_what_is_no_loss_or_no_state_is_refused() -> None:
    for loss in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"a loss must be in \[0, 1\]"):
            new_monitor(0.1).updated(loss)
    state = new_monitor(0.1).model_dump() | {"risk": 0.001}
    with pytest.raises(ConfigError, match="one number per bet"):
        validated(DriftMonitor, state)
    with pytest.raises(ValueError, match="risk"):
        new_monitor(1.5)
