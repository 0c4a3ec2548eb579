"""The figures of a gate."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ee.tuning.gates import calibration_error, ranking_quality


def test_ranking() -> None:
    hits = torch.tensor([True, False, True, False])
    assert ranking_quality(torch.tensor([0.9, 0.1, 0.8, 0.2]), hits) == 1
    assert ranking_quality(torch.tensor([0.1, 0.9, 0.2, 0.8]), hits) == 0
    assert ranking_quality(torch.full((4,), 0.5), hits) == 0.5  # ties count half
    assert ranking_quality(torch.tensor([0.3, 0.3, 0.8, 0.2]), hits) == pytest.approx(3.5 / 4)
    assert math.isnan(ranking_quality(torch.rand(4), torch.ones(4, dtype=torch.bool)))


def test_calibration() -> None:
    hits = torch.tensor([True, True, True, False])
    assert calibration_error(torch.full((4,), 0.75), hits) == pytest.approx(0)
    assert calibration_error(torch.ones(4), hits) == pytest.approx(0.25)
    assert calibration_error(torch.tensor([0.0, 1.0, 1.0, 0.0]), hits) == pytest.approx(0.25)
