"""Tests by betting: whether the mean of losses is below a stated value.

A player bets before each loss that it will be low. Under the null hypothesis the bets are fair or worse, so
the wealth, which starts at 1, exceeds 1 / p at any time with probability at most p (Ville's inequality). This needs no
distribution and no sample size: losses in [0, 1] whose mean, given those before them, is on the null's side. The null
hypothesis is *mean >= m*, and the wealth against it is the product of ``1 + bet * (m - loss)`` with bets in
``[0, 1 / (1 - m)]``. The bets must be predictable: the bet on a loss depends on the losses before it only.
Waudby-Smith and Ramdas, arXiv 2010.09686, sections 4 and 5 and appendix B.

The bets here are Kelly's for losses that are 0 or ``scale``, where ``scale`` is estimated as the ratio of the losses'
second moment to their mean: it is 1 for losses that are 0 or 1, and smaller for losses that vary less. Then the bets
are larger, and the test is stronger.

All arrays have the losses of one sample along the last axis; other axes are independent samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logit, rel_entr

from megatron_ee.evaluation.statistics import Floats

BOLDEST = 0.9
"""Largest share of the largest possible bet, where the bet is larger than for losses that are 0 or 1. A single loss
then takes at most this share of the wealth. Smaller shares were weaker or equal for all losses that were tried."""
_SCALES = np.linspace(0.0, 1.0, 513)[1:]
_TINY = 1e-300
_NEWTON_STEPS = 12
_ROUNDING = 1e-12


def betting_p(losses: ArrayLike, mean: float, delta: float) -> Floats:
    """p-value of the null hypothesis *mean >= ``mean``*: 1 / the largest wealth on the way, at most 1.

    Args:
        losses: ``[..., n]`` in [0, 1], in an order that does not depend on their values.
        mean: the bound, in (0, 1).
        delta: the significance at which the test is to be strong. The p-value is valid for every one.

    Returns:
        ``[...]``.
    """
    gains = horizon_bets(losses, mean, delta) * (mean - np.asarray(losses, dtype=np.float64))
    with np.errstate(divide="ignore"):  # the whole wealth may be lost
        wealth = np.cumsum(np.log1p(np.maximum(gains, -1.0)), axis=-1)
    return np.exp(-np.maximum(wealth.max(axis=-1, initial=0.0), 0.0))


def horizon_bets(losses: ArrayLike, mean: float, delta: float) -> Floats:
    """Predictable bets that the mean is below ``mean``, for a sample of known size, ``[..., n]``.

    They aim at a wealth of 1 / ``delta`` after the n losses of the sample, for the largest mean at which this is
    possible (as appendix B.1 of the paper does with a Gaussian approximation). For losses that are 0 or 1 this is one
    constant bet, whose wealth at the end reaches 1 / ``delta`` exactly where Hoeffding's p-value ``exp(-n kl(observed
    mean, mean))`` is at most ``delta``. So with the largest wealth on the way, the test is never weaker than
    Hoeffding's. The logarithm is concave, which makes the same true for all losses in [0, 1] while the scale is 1.

    Args:
        losses: ``[..., n]`` in [0, 1].
        mean: the bound, in (0, 1).
        delta: the significance, in (0, 1).

    Raises:
        ValueError: a loss is outside [0, 1].
    """
    values = checked(losses)
    estimated = _estimated_scales(values)
    scales = _SCALES if estimated.min(initial=1.0) < 1 else _SCALES[-1:]
    alternatives = _reachable(mean / scales, np.log(1 / delta) / max(values.shape[-1], 1)) * scales
    table = _kelly(alternatives, mean, scales)
    most = max(float(table[-1]), BOLDEST / (1 - mean))
    return np.minimum(np.interp(estimated, scales, np.minimum(table, most)), 1 / (1 - mean))


def checked(losses: ArrayLike) -> Floats:
    """Losses as an array.

    Raises:
        ValueError: a loss is outside [0, 1], where no test of this package is valid.
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError("losses must be in [0, 1]")
    return values


def _estimated_scales(losses: Floats) -> Floats:
    """For each loss, the estimated scale of those before it and one pseudo-loss of 1, ``[..., n]`` in (0, 1]."""
    return (1 + _before(losses**2)) / (1 + _before(losses))


def _before(values: Floats) -> Floats:
    """Sums of the values before each one; the rounding never makes them negative."""
    return np.concatenate([np.zeros_like(values[..., :1]), np.cumsum(values, axis=-1)[..., :-1]], axis=-1)


def _kelly(alternative: Any, mean: float, scale: Any) -> Floats:
    """The bet with the fastest growth if losses are 0 or ``scale`` with mean ``alternative``; it may be infinite."""
    edge = np.maximum(mean - alternative, 0.0)
    room = mean * np.maximum(scale - mean, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        bets = edge / room
    return np.where(edge > 0, bets, 0.0)


def _reachable(means: Floats, rate: float) -> Floats:
    """For each of ``means`` in (0, oo), the largest q <= mean with a Bernoulli divergence kl(q, mean) of ``rate``.

    0 if there is none. A mean of 1 or more makes every loss an outlier: then the q is 0, too.
    """
    inside = np.minimum(means, 1 - 1e-12)
    q, logits = np.maximum(inside - np.sqrt(rate / 2), _TINY), logit(inside)
    for _ in range(_NEWTON_STEPS):  # from below, by Pinsker; the divergence is convex, so no step goes past the root
        q -= (kl(q, inside) - rate) / (logit(q) - logits)
    return np.where((means < 1) & (kl(0.0, inside) > rate), q * (1 - _ROUNDING), 0.0)


def kl(q: ArrayLike, p: ArrayLike) -> Floats:
    """Divergence of a Bernoulli distribution with mean ``q`` in [0, 1] from one with mean ``p`` in (0, 1), in nats."""
    q, p = np.asarray(q, dtype=np.float64), np.asarray(p, dtype=np.float64)
    divergence: Floats = rel_entr(q, p) + rel_entr(1 - q, 1 - p)
    return divergence
