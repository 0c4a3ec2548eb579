"""The figures about saves: their parts fit together, and what was measured is gone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_ee.benchmark.saving import SavingBenchmark, benchmark_saving
from megatron_ee.errors import UserError


def test_figures_fit_together(tmp_path: Path) -> None:
    result: SavingBenchmark = benchmark_saving(tmp_path, megabytes=40, repeats=1)
    assert list(tmp_path.iterdir()) == []
    assert result.state["tensors"] == 64 and result.state["bytes"] == pytest.approx(40e6, rel=0.01)
    figures = dataclasses.asdict(result)
    assert all(value > 0 for value in figures.values() if isinstance(value, float))
    assert result.ratio == result.synchronous_seconds / result.asynchronous_seconds
    assert result.asynchronous_seconds < result.writing_seconds


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises((UserError, OSError), match="nowhere"):
        benchmark_saving(tmp_path / "nowhere", megabytes=1, repeats=1)
