"""Bootstrap confidence intervals of paired differences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000
_AT_ONCE = 2**23  # drawn rows at a time


def paired_intervals(
    differences: NDArray[np.float64], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
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
