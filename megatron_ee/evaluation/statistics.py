"""Confidence intervals and tests of means: bootstrap, Wilson, permutations and Holm. They know nothing of exits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, permutation_test

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Of the intervals."""
RESAMPLES = 10_000
PERMUTATIONS = 9999
_AT_ONCE = 2**23  # drawn rows at a time
_EPSILON = 1e-12


def paired_intervals(differences: Floats, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Percentile intervals of the mean of each column, from rows that are drawn with replacement.

    A row holds what one unit (a prompt) adds to each difference, so pairs stay together. All columns use the same
    draws. An interval of a column without any difference is [0, 0]: with n rows, that only says that the true share of
    differing rows is probably below 3 / n.

    Args:
        differences: ``[rows, columns]``, with at least one row.
        level: share of such intervals that hold the true mean, for many rows.
        resamples: number of draws of all rows.
        seed: of the draws.

    Returns:
        ``[columns, 2]``: lower and upper ends.
    """
    rows = len(differences)
    generator = np.random.default_rng(seed)
    means, step = [], max(1, _AT_ONCE // rows)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(0, rows, (count, rows))
        places = drawn + rows * np.arange(count)[:, None]
        times = np.bincount(places.ravel(), minlength=count * rows).reshape(count, rows)  # each row's number of draws
        means.append(times @ differences / rows)
    tail = (1 - level) / 2
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0).T


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's interval, with ``LEVEL``, of a probability from ``successes`` in ``count`` independent trials."""
    found = binomtest(successes, count).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's step-down method, in the same order.

    Rejecting those of at most a level gives a false rejection with at most this probability, however they depend on
    each other.
    """
    corrected, highest = [1.0] * len(p_values), 0.0
    for done, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - done) * p_values[index]))
        corrected[index] = highest
    return corrected


def permutation_p(inside: Floats, outside: Floats, rng: np.random.Generator, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p-value of a permutation test that two samples have the same mean.

    The statistic is Welch's t. So the test is exact if both samples have one distribution, and holds for many records
    if only their means are equal (Janssen, Statistics & Probability Letters 36, 1997).

    Args:
        inside: one sample ``[records]``, of two or more.
        outside: the other, likewise.
        rng: makes the permutations.
        permutations: how many; all, if there are not more.
    """
    values = np.concatenate([inside, outside])
    spread = values.std()
    if spread < _EPSILON:
        return 1.0
    samples = tuple((each - values.mean()) / spread for each in (inside, outside))
    found = permutation_test(
        samples,
        _welch,
        vectorized=True,
        alternative="greater",
        n_resamples=permutations,
        batch=max(1, 2**20 // len(values)),
        rng=rng,
    )
    return float(found.pvalue)


def _welch(inside: Floats, outside: Floats, axis: int) -> Floats:
    """Absolute Welch's t of standardised values along ``axis``."""
    variances = [each.var(axis=axis, ddof=1) / each.shape[axis] for each in (inside, outside)]
    difference = np.abs(inside.mean(axis=axis) - outside.mean(axis=axis))
    # Equal statistics must be equal numbers, whatever the order of the values was.
    return np.round(difference / np.sqrt(np.maximum(sum(variances), _EPSILON)), 9)
