"""A packed backbone, as if on CUDA: codes of all layers and the expanded weights of one, as planned."""

from __future__ import annotations

import pytest

from megatron_ee.planning.parameters import layer_parameters
from megatron_ee.testing.examples import example_architecture

from . import report
from .checks import problems
from .runs import Tuning
from .worker import Worker

FEW = ("--exits", "[{layer: 5, body: mlp, head: shared}, {layer: 20, body: norm, head: shared}]")
CASE = Tuning(
    "llama2_7b",
    processes=1,
    overrides=(*FEW, "--model.quantise", "int4", "--parallel.pipeline", "1", "--tuning.global_batch_size", "4"),
    microbatches=4,
)


@pytest.mark.slow
def test_layers_are_held_in_four_bits(worker: Worker) -> None:
    result = worker.run(CASE)
    print(report.line(result), report.details(result), sep="\n")
    assert problems(result) == []
    layers = 2 * 20 * layer_parameters(example_architecture(CASE.example))
    assert result.planned < layers, "less than the expanded layers alone"
