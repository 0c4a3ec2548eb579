"""p-values of the null hypothesis *the expected loss is above the risk*, and tests of them in a fixed sequence.

Learn then test (Angelopoulos et al., arXiv 2110.01052): every setting of the exits has such a null hypothesis. The
settings are tested in an order that is fixed beforehand, from safe to fast, each at significance delta, until the first
is not rejected (fixed-sequence testing, section 3.2 there). Then the probability that any accepted setting has an
expected loss above the risk is at most delta, over the draw of the sample. No correction for the number of settings is
needed, and no assumption about the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom

from megatron_ee.evaluation.calibration.betting import betting_p, checked, kl
from megatron_ee.evaluation.statistics import Floats
from megatron_ee.inference.certificate import PValue

_BOUNDS = np.concatenate((np.arange(1, 100) / 1000, np.arange(10, 101) / 100))
"""Possible results of ``largest_risk``."""


def hoeffding_bentkus_p(losses: ArrayLike, risk: float, delta: float = 0.0) -> Floats:
    """The smaller of Hoeffding's and Bentkus's p-values (Bates et al., arXiv 2101.02703, section 3.1.2).

    Args:
        losses: ``[..., n]`` in [0, 1].
        risk: the bound, in (0, 1).
        delta: has no effect; it is there for the p-values that need it.

    Returns:
        ``[...]``.

    Raises:
        ValueError: a loss is outside [0, 1].
    """
    values = checked(losses)
    count = values.shape[-1]
    if count == 0:
        return np.ones(values.shape[:-1])
    total = values.sum(axis=-1)
    hoeffding = np.exp(-count * kl(np.minimum(total / count, risk), risk))
    # Rounding must not raise the ceiling of a whole number.
    bentkus = math.e * binom.cdf(np.ceil(total - 1e-9), count, risk)
    return np.minimum(np.minimum(hoeffding, bentkus), 1.0)


P_VALUES: Mapping[PValue, Callable[[ArrayLike, float, float], Floats]] = {
    "betting": betting_p,
    "hoeffding-bentkus": hoeffding_bentkus_p,
}
"""p-values of ``losses [..., n]``, risk and delta. Those of betting depend on the order of the losses."""
assert set(P_VALUES) == set(get_args(PValue))


def smallest_count(name: PValue, risk: float, delta: float) -> int:
    """The smallest sample that could pass at all: with all losses 0, its p-value is at most ``delta``.

    Both p-values are then ``(1 - risk) ** n``, which no valid p-value beats, since it is the probability of n losses of
    0 where a loss is 1 with probability ``risk``.
    """
    count = max(1, math.ceil(math.log(delta) / math.log1p(-risk)) - 1)
    while P_VALUES[name](np.zeros(count), risk, delta) > delta:
        count += 1
    return count


def passing(p_values: Mapping[str, float], delta: float, *, together: bool = False) -> list[str]:
    """The scopes for which a setting passes. Fixed-sequence testing goes on to the next setting for these alone.

    Args:
        p_values: of the setting, by scope.
        delta: of each test.
        together: the setting passes for all scopes or for none, since what is promised holds for every one.
    """
    passed = [name for name, p in p_values.items() if p <= delta]
    return passed if not together or len(passed) == len(p_values) else []


def fixed_sequence(p_values: Iterable[float], delta: float) -> int:
    """Number of settings that pass in a single scope, in the order of ``p_values``. Nothing is read after the first
    that fails."""
    passed = 0
    for p in p_values:
        if not passing({"": p}, delta):
            break
        passed += 1
    return passed


def largest_risk(name: PValue, losses: ArrayLike, delta: float) -> float:
    """Upper confidence bound of the expected loss at confidence 1 - ``delta``, rounded up to 0.001, above 0.1 to 0.01.

    It is the smallest of these values that is rejected as the mean together with all larger ones. The p-value of
    betting may rise with the mean, so one rejected value alone would not be a bound.

    The bound is for one setting that is given beforehand. For a setting that was chosen by tests on the same losses,
    the statement is the tested risk.
    """
    bound = 1.0  # cannot be exceeded
    for smaller in reversed(_BOUNDS[:-1].tolist()):
        if not P_VALUES[name](losses, smaller, delta) <= delta:
            break
        bound = smaller
    return bound
