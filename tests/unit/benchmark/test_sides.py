"""Both sides of the comparison do the same work, and it is counted right."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ee.benchmark.losses import losses
from megatron_ee.benchmark.ours import ours
from megatron_ee.benchmark.plain import plain
from megatron_ee.benchmark.shape import Step, loss_flops, our_flops, plain_flops
from megatron_ee.benchmark.tune import check_same
from megatron_ee.parallel.groups import Groups


@pytest.fixture(autouse=True)
def one_world(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one world: the sides, which make their own in a process of their own, take the tests'."""
    for module in ("ours", "losses"):
        monkeypatch.setattr(f"megatron_ee.benchmark.{module}.process_groups", lambda: contextlib.nullcontext(groups))


PADDED = 384  # the vocabulary of 300, rounded up to a multiple of 128


def count_flops(work: Any) -> int:
    """Of matrix products, without attention's kernel, which the counter knows on some devices only."""

    def product(a: Any, b: Any, c: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * b[0] * b[1] * c[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})
    with counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in counts.items() if "scaled_dot" not in str(operator))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_agree_step_after_step(small_step: Step, dtype: str) -> None:
    step = replace(small_step, dtype=dtype)
    with ours(step) as left, plain(step) as right:
        results = [(left.step(), right.step()) for _ in range(4)]
    for number, (a, b) in enumerate(results):
        check_same(dtype, number, a, b)
        assert a["seconds"] > 0
        assert b["seconds"] > 0
    # The updates count: the same batch is learned.
    for exit_ in range(2):
        trajectory = [a["losses"][exit_] for a, _ in results]
        assert trajectory == sorted(trajectory, reverse=True)
        assert trajectory[0] - trajectory[-1] > 1e-3


def test_different_work_is_noticed(small_step: Step) -> None:
    with ours(small_step) as left, plain(replace(small_step, exits=(2, 3))) as right:
        a, b = left.step(), right.step()
    with pytest.raises(RuntimeError, match="do not compute the same"):
        check_same("float32", 0, a, b)
    check_same("float32", 0, a, a)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        check_same("float32", 0, a, {**a, "grad_norm": a["grad_norm"] * 1.01})


def test_flops_are_those_that_torch_counts(small_step: Step) -> None:
    with ours(small_step) as side:
        side.step()
        assert count_flops(side.step) == our_flops(small_step, PADDED).linear
        assert side.flops() == our_flops(small_step, PADDED).total
    with plain(small_step) as side:
        side.step()
        assert count_flops(side.step) == plain_flops(small_step).linear
        assert side.flops() == plain_flops(small_step).total


def test_attention_is_counted_over_the_visible_half(small_step: Step) -> None:
    step = replace(small_step, exits=(3,))
    pairs = sum(position + 1 for position in range(step.tokens))
    assert our_flops(step, PADDED).attention == 3 * 4 * pairs * step.shape.hidden
    assert plain_flops(step).attention == step.shape.layers * 4 * pairs * step.shape.hidden


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ways_of_the_exit_loss_agree(small_step: Step, dtype: str) -> None:
    with losses(replace(small_step, dtype=dtype)) as side:
        ways = side.ways()
        assert ways[:2] == ["ours", "plain"]
        values = {way: side.run(way)["loss"] for way in ways}
        gradients = {way: side.gradients(way) for way in ways}
    for way in ways:
        assert values[way] == pytest.approx(values["ours"], rel=1e-5 if dtype == "float32" else 2e-3)
        assert gradients[way] == pytest.approx(gradients["ours"], rel=1e-4 if dtype == "float32" else 2e-2)


def test_flops_of_the_exit_loss(small_step: Step) -> None:
    with losses(small_step) as side:
        assert count_flops(lambda: side.run("plain")) == loss_flops(small_step)
