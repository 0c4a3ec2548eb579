"""A small random model, made as the benchmark makes its own."""

from __future__ import annotations

import pytest

from megatron_ee.benchmark.machine import Machine
from megatron_ee.benchmark.shape import Shape, Step


@pytest.fixture(scope="session")
def small_step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    """A float32 step on a saved model; the chunk does not divide the sequence, nor the head 128."""
    shape = Shape(hidden=64, layers=4, ffn=96, heads=2, vocab=300)
    step = Step(str(tmp_path_factory.mktemp("model")), shape, (1, 3), "float32", tokens=48, chunk_tokens=20)
    Machine().make_model(step.directory, shape, "float32", step.tokens)
    return step
