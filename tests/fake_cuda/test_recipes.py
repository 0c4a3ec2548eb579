"""The configurations for one GPU, at their real size, as if on CUDA: they hold what is planned, which fits."""

from __future__ import annotations

import pytest

from megatron_ee.planning.devices import memory_needed
from megatron_ee.testing.examples import RECIPES

from . import report
from .checks import problems
from .runs import Tuning
from .worker import Worker


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, worker: Worker) -> None:
    """All microbatches of a step, since streamed layers keep the hidden states of all of them."""
    result = worker.run(Tuning(recipe, processes=1, microbatches=16))
    print(report.line(result), report.details(result), sep="\n")
    assert problems(result) == []
    assert memory_needed(result.peak) <= RECIPES[recipe] * 1e9
