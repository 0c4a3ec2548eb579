"""Bootstrap intervals of paired differences, and tests with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_ee.evaluation.statistics import holm, paired_intervals, permutation_p, wilson


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


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001, 0.5, 0.012]) == pytest.approx([1.0, 0.004, 1.0, 0.036])
    assert holm([]) == [] and holm([0.2]) == [0.2]


def test_a_permutation_test_by_hand() -> None:
    rng = np.random.default_rng(0)
    # Two of the twenty ways to choose three of six, and one of the fifteen ways to choose two.
    assert permutation_p(np.array([1.0, 2, 3]), np.array([4.0, 5, 6]), rng) == pytest.approx(2 / 20)
    assert permutation_p(np.array([0.0, 0]), np.array([1.0, 1, 1, 1]), rng) == pytest.approx(1 / 15)
    assert permutation_p(np.ones(3), np.ones(3), rng) == 1
    # By drawn permutations, against the normal approximation of a difference of 2.5 standard errors.
    many = np.tile([0.0, 1, 2, 3, 4], 40)
    shifted = many + 2.5 * math.sqrt(2 * many.var() / len(many))
    assert permutation_p(many, shifted, rng, 4999) == pytest.approx(0.0124, abs=0.006)


def test_wilson_by_hand() -> None:
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
