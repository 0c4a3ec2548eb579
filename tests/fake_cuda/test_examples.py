"""The example configurations, at their real size and in their own layout, as if on CUDA."""

from __future__ import annotations

import pytest

from megatron_ee.testing.examples import MODELS

from . import report
from .checks import problems
from .runs import MODES, Inference, Tuning
from .worker import Worker


@pytest.mark.parametrize("example", MODELS)
def test_tuning_step(example: str, worker: Worker) -> None:
    """On the last rank, which has the deepest layers."""
    result = worker.run(Tuning(example, rank=-1))
    print(report.line(result), report.details(result), sep="\n")
    assert problems(result) == []


@pytest.mark.parametrize("example", MODELS)
def test_inference(example: str, worker: Worker) -> None:
    for mode in MODES:
        result = worker.run(Inference(example, mode))
        print(report.line(result), report.details(result), sep="\n")
        assert problems(result) == [], mode
