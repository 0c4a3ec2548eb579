"""The activations of models with options that none of the example configurations' models has."""

from __future__ import annotations

import pytest

from .cases import exits
from .checks import TOLERANCE, problems
from .runs import Tuning
from .worker import Worker

SMALL = ("--data.sequence_length", "2048", "--tuning.micro_batch_size", "1", "--loss.chunk_tokens", "16")
"""With these, weights and logits do not hide the activations."""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma2_2b", "olmo2_7b"])  # soft caps and (1 + w) norms; norms over projections
@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("norm", "shared"),  # most memory is taken by attention in the frozen layers
        ("mlp", "own"),
        ("layer", "own"),
    ],
)
def test_planned_activations_are_those_of_a_step(model: str, body: str, head: str, worker: Worker) -> None:
    overrides = (*exits(body, head, 2), *SMALL)
    result = worker.run(Tuning("llama2_7b", overrides=overrides, microbatches=1, model=model))
    assert problems(result) == []
    measured = result.peak - (result.planned - result.activations)
    assert measured == pytest.approx(result.activations, rel=TOLERANCE)
