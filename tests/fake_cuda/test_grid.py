"""Every kind of exit, layout and mode at real size, as if on CUDA."""

from __future__ import annotations

import pytest

from . import report
from .cases import fitting_grid, inference_grid, tuning_grid
from .checks import problems
from .runs import Case
from .worker import Worker

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", [*tuning_grid(), *fitting_grid(), *inference_grid()], ids=lambda case: case.name)
def test_run(case: Case, worker: Worker) -> None:
    result = worker.run(case)
    print(report.line(result), report.details(result), sep="\n")
    assert problems(result) == []
