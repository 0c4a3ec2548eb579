"""A streamed backbone, as if on CUDA: two layers' weights are on the device, whatever the depth, as planned."""

from __future__ import annotations

import pytest

from megatron_ee.planning.parameters import layer_parameters
from megatron_ee.testing.examples import example_architecture

from . import report
from .checks import TOLERANCE, problems
from .runs import Tuning
from .worker import Worker

FEW = ("--exits", "[{layer: 5, body: mlp, head: shared}, {layer: 20, body: norm}]", "--model.residency", "host")
ALONE = ("--parallel.pipeline", "1", "--tuning.global_batch_size", "4", "--tuning.micro_batch_size", "1")
TENSOR = ("--parallel.tensor", "2", "--parallel.pipeline", "1", "--parallel.sequence", "true")
TAUGHT = ("--loss.distillation.kl", "1.0", "--tuning.global_batch_size", "8")
HOST = ("--optimizer.implementation", "deepspeed_cpu")
CASES = [
    (Tuning("llama2_7b", processes=1, overrides=(*FEW, *ALONE), microbatches=4), 1),
    (Tuning("llama2_7b", 1, 2, (*FEW, *ALONE, *HOST), microbatches=2), 1),
    (Tuning("llama2_13b", -1, 4, (*FEW, *TENSOR, *TAUGHT), microbatches=4), 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "tensor"), CASES)
def test_at_most_three_layers_are_on_the_device(case: Tuning, tensor: int, worker: Worker) -> None:
    result = worker.run(case)
    print(report.line(result), report.details(result), sep="\n")
    assert problems(result) == []
    layer = 2 * layer_parameters(example_architecture(case.example), tensor)
    assert layer > TOLERANCE * result.planned, "the plan, which counts two layers, would not show a third one"
