"""Bootstrap intervals of paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ee.evaluation.bootstrap import paired_intervals


def test_an_interval_is_the_spread_of_the_mean() -> None:
    """Against the normal approximation, which is good for many rows."""
    values = np.random.default_rng(1).normal(0.3, 2.0, (900, 2))
    found = paired_intervals(values)
    half = 1.96 * values.std(0) / 30
    assert found == pytest.approx(np.stack([values.mean(0) - half, values.mean(0) + half], axis=1), abs=0.02)
    narrow = paired_intervals(values, level=0.5)
    assert (found[:, 0] < narrow[:, 0]).all() and (narrow[:, 1] < found[:, 1]).all()


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        low, high = paired_intervals(generator.choice([-1.0, 0.0, 1.0], (100, 1), p=[0.3, 0.6, 0.1]), resamples=500)[0]
        held += low <= -0.2 <= high
    assert 178 <= held <= 199


def test_draws_are_those_of_the_seed_whatever_the_number_of_columns() -> None:
    values = np.random.default_rng(3).random((50, 3))
    assert paired_intervals(values)[:1] == pytest.approx(paired_intervals(values[:, :1]), rel=1e-12)
    assert (paired_intervals(values, seed=1) != paired_intervals(values)).any()


def test_equal_rows_have_no_spread() -> None:
    assert paired_intervals(np.zeros((20, 2))).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert paired_intervals(np.ones((1, 1))).tolist() == [[1.0, 1.0]]
