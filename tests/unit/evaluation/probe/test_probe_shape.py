"""Forecasts for a model of another shape on a GPU: times by hand, exits at the same share of the depth."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ee.evaluation.probe.forecast import Records, best_speculative
from megatron_ee.evaluation.probe.shape import Shape
from megatron_ee.planning.devices import find_device
from megatron_ee.testing.examples import example_architecture


def records(layers: tuple[int, ...]) -> Records:
    rows = np.array([[layer % 3 == 0] * 60 for layer in layers])
    starts = np.zeros(60, dtype=bool)
    starts[0] = True
    return Records(layers, np.full(rows.shape, 0.9, dtype=np.float32), rows, starts)


def test_times_are_those_of_reading_the_weights() -> None:
    shape = Shape("7b", example_architecture("llama2_7b"), find_device("h100"))
    times, bandwidth = shape.times(), 3.35e12
    layer, mlp, head = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, 3 * 4096 * 11008, 32_000 * 4096
    assert times.layer[1] == times.layer[16] == pytest.approx(2 * layer / bandwidth)
    assert times.head[1] == pytest.approx(2 * head / bandwidth) and times.body[1] == pytest.approx(2 * mlp / bandwidth)
    assert times.full() == pytest.approx(2 * (32 * layer + head) / bandwidth)  # 3.9 ms a token
    large = Shape("70b", example_architecture("llama2_70b"), find_device("h100"))
    assert (shape.gpus, large.gpus) == (1, 2)
    assert large.times().head[1] == pytest.approx(2 * 32_000 * 8192 / bandwidth / 2)


def test_products_decide_where_they_take_longer() -> None:
    from dataclasses import replace

    slow = replace(find_device("h100"), bfloat16=1e12)
    times = Shape("7b", example_architecture("llama2_7b"), slow).times()
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert times.layer[16] == pytest.approx(2 * 16 * layer / 1e12)


def test_exits_keep_their_share_of_the_depth() -> None:
    deep, small = (Shape(name, example_architecture(name), find_device("a100")) for name in ("llama2_70b", "llama2_7b"))
    measured = records(tuple(range(1, 30)))
    there = deep.records(measured, 30)
    assert there.layers[0] == 3 and there.layers[-1] == 77 and len(there.layers) == 29
    assert (there.agrees == measured.agrees).all()
    # 80 layers as 32: several come to one place, and the last is kept, which is never after the last layer.
    back = small.records(records(tuple(range(1, 80))), 80)
    assert back.layers == tuple(range(1, 32))
    assert back.agrees[:, 0].tolist() == [layer % 3 == 0 for layer in small.places(range(1, 80), 80).values()]


def test_a_draft_that_is_always_accepted_gains_what_the_layers_allow() -> None:
    shape = Shape("70b", example_architecture("llama2_70b"), find_device("h100"))
    one = records((10,))
    always = Records(one.layers, one.confidence, np.ones_like(one.agrees), one.starts)
    found = best_speculative(shape.records(always, 80), shape.times())
    assert found.tokens_per_round == 15.0  # of 60 tokens
    assert 4 < found.speedup < 8  # 16 passes through an eighth of the layers, and one through the others
