"""Drift: sequential tests of whether the mean loss of audited requests is still at most the certified risk.

Each audited request gives a loss in [0, 1]. The hypothesis is that its mean, given all audited requests before it, is
at most ``risk``. The losses need be neither independent nor equally distributed.

A wealth of 1 is bet against the hypothesis: a bet b in [0, 1/risk) on a loss x multiplies it by 1 + b (x - risk), which
is positive, and has a mean of at most 1 under the hypothesis. The wealth is divided equally among a few fixed bets
(``fixed_bets``), so what is bet in all moves by itself towards the bets that have gained. Bets that follow the mean of
the losses so far first have to learn it, and took up to five times as many audits to an alarm in simulations; after a
long good time they stay small. Two tests use the fixed bets:

- *from the start*: all bets begin at the first audit. The wealth ever reaches 1/level with probability at most level
  (Ville's inequality). It is the stronger one where the losses are too high from the beginning on.
- *restarting*: new bets of 1 begin at every audit, and the wealth of all of them is summed (the Shiryaev-Roberts
  e-detector of Shin, Ramdas and Rinaldo, arXiv 2203.03532, as a mixture over bets). The sum reaches 1/level after
  1/level audits or more on average under the hypothesis. It then begins again at 0, so among n audits there are at most
  n level false alarms on average. A change after a long good time is found as fast as one at the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from megatron_ee.config.validation import Strict
from megatron_ee.evaluation.statistics import Floats

ALARM_LEVEL = 0.01
SMALLEST_EXCESS = 0.5
"""The smallest bet is the best one if losses are 0 or 1 and their mean is this share above the risk."""
LARGEST_STAKE = 0.5
"""Share of its wealth that the largest bet loses where a loss is 0."""


def fixed_bets(risk: float) -> Floats:
    """The bets, ascending, in (0, 1/risk). Each is twice the one before it, the last at most.

    A bet b is the best one (it maximises the mean logarithm of the wealth) if losses are 0 or 1 with a mean of
    risk + b risk (1 - risk).

    Raises:
        ValueError: ``risk`` is not in (0, 1).
    """
    if not 0 < risk < 1:
        raise ValueError(f"risk must be between 0 and 1, not {risk}")
    smallest, largest = SMALLEST_EXCESS / (1 - risk), LARGEST_STAKE / risk
    count = math.ceil(math.log2(largest / smallest)) if smallest < largest else 0
    return np.append(smallest * 2.0 ** np.arange(count), largest)


def bet_once(wealths: Floats, sums: Floats, losses: Floats, bets: Floats, risk: float) -> tuple[Floats, Floats]:
    """Bet on one audited loss of each stream.

    Args:
        wealths: logarithm of the wealth of each bet since the start ``[..., bets]``.
        sums: logarithm of 1 + the restarting test's sum of each bet ``[..., bets]``.
        losses: ``[...]`` in [0, 1].
        bets: from ``fixed_bets``.
        risk: in (0, 1).

    Returns:
        ``wealths`` and ``sums`` afterwards.
    """
    gains = np.log1p(bets * (losses[..., None] - risk))
    return wealths + gains, np.logaddexp(0.0, sums + gains)


def mixed_log_wealth(wealths: Floats) -> Floats:
    """Logarithm of the whole wealth ``[...]``, of which each bet began with an equal part."""
    return np.logaddexp.reduce(wealths, axis=-1) - math.log(wealths.shape[-1])


def mixed_sum(sums: Floats) -> Floats:
    """The restarting test's sum ``[...]``."""
    return np.expm1(sums).mean(axis=-1)


class DriftMonitor(Strict):
    """State of both tests. It is small, and its JSON form is exact, so a server can go on after a restart.

    Attributes:
        risk: the certified risk.
        alarm_level: of both tests.
        audits: losses so far.
        loss_sum: their sum.
        wealths, sums: by bet, see ``bet_once``.
        peak: highest logarithm of the wealth so far.
        alarm: the test from the start: number of the audit, from 1, at which the wealth reached 1/level; None if it
            never did.
        restarts: alarms of the restarting test.
        last_restart: number of the audit, from 1, of the last of them.
    """

    risk: float = Field(gt=0, lt=1)
    alarm_level: float = Field(default=ALARM_LEVEL, gt=0, lt=1)
    audits: int = Field(default=0, ge=0)
    loss_sum: float = 0.0
    wealths: tuple[float, ...] = Field(strict=False)
    sums: tuple[float, ...] = Field(strict=False)
    peak: float = 0.0
    alarm: int | None = None
    restarts: int = 0
    last_restart: int | None = None

    @model_validator(mode="after")
    def _one_per_bet(self) -> DriftMonitor:
        if not len(self.wealths) == len(self.sums) == len(fixed_bets(self.risk)):
            raise ValueError("wealths and sums must have one number per bet; begin again with new_monitor")
        return self

    def updated(self, loss: float) -> DriftMonitor:
        """The state after one more audited loss. Losses come in the order in which their requests were admitted.

        Raises:
            ValueError: ``loss`` is not in [0, 1].
        """
        if not 0 <= loss <= 1:
            raise ValueError(f"a loss must be in [0, 1], not {loss}")
        state = np.array(self.wealths), np.array(self.sums)
        wealths, sums = bet_once(*state, np.asarray(loss, np.float64), fixed_bets(self.risk), self.risk)
        audits, wealth = self.audits + 1, float(mixed_log_wealth(wealths))
        changes = {
            "audits": audits,
            "loss_sum": self.loss_sum + loss,
            "wealths": tuple(wealths.tolist()),
            "peak": max(self.peak, wealth),
        }
        if self.alarm is None and wealth >= -math.log(self.alarm_level):
            changes["alarm"] = audits
        if mixed_sum(sums) >= 1 / self.alarm_level:
            sums = np.zeros_like(sums)
            changes |= {"restarts": self.restarts + 1, "last_restart": audits}
        return self.model_copy(update={**changes, "sums": tuple(sums.tolist())})

    @property
    def mean_loss(self) -> float | None:
        """Of all audits; None before the first."""
        return self.loss_sum / self.audits if self.audits else None

    @property
    def log_wealth(self) -> float:
        """Of the test from the start; it alarms at -log(alarm_level)."""
        return float(mixed_log_wealth(np.array(self.wealths)))

    @property
    def detector(self) -> float:
        """Of the restarting test; it alarms, and begins again at 0, at 1/alarm_level."""
        return float(mixed_sum(np.array(self.sums)))

    @property
    def p_value(self) -> float:
        """Of the test from the start: valid however often it is looked at (anytime-valid)."""
        return math.exp(-self.peak)


def new_monitor(risk: float, alarm_level: float = ALARM_LEVEL) -> DriftMonitor:
    """A monitor before the first audit.

    Args:
        risk: the mean loss that is allowed, in (0, 1).
        alarm_level: in (0, 1). The largest probability that the test from the start ever gives a false alarm; the
            restarting test gives one after 1/level audits or more on average.
    """
    zeros = (0.0,) * len(fixed_bets(risk))
    return DriftMonitor(risk=risk, alarm_level=alarm_level, wealths=zeros, sums=zeros)


@dataclass(frozen=True)
class DriftHistory:
    """Both tests over the losses of a log.

    Attributes:
        monitor: after the last loss.
        losses: ``[audits]``.
        log_wealths: logarithm of the wealth after each loss ``[audits]``.
        detectors: the restarting test's sum after each loss, before it begins again ``[audits]``.
        restarts: numbers of the audits, from 1, at which the restarting test alarmed.
    """

    monitor: DriftMonitor
    losses: Floats
    log_wealths: Floats
    detectors: Floats
    restarts: tuple[int, ...]


def run_monitor(monitor: DriftMonitor, losses: Sequence[float]) -> DriftHistory:
    """Run a monitor over losses in the order of admission."""
    wealths, detectors, restarts = [], [], []
    for loss in losses:
        before, monitor = monitor, monitor.updated(loss)
        alarmed = monitor.restarts > before.restarts
        if alarmed:
            restarts.append(monitor.audits)
        wealths.append(monitor.log_wealth)
        detectors.append(1 / monitor.alarm_level if alarmed else monitor.detector)
    return DriftHistory(monitor, np.array(losses, np.float64), np.array(wealths), np.array(detectors), tuple(restarts))
