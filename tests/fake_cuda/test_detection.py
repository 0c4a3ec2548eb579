"""The runs find what they are there to find: planted faults."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from .checks import problems
from .host_syncs import allowed, not_allowed
from .runs import Inference, Result, Tuning
from .worker import Fault, Worker

pytestmark = pytest.mark.slow  # tests of the test

TUNING = Tuning("llama3.1_8b", rank=1, microbatches=1, overrides=("--exits", "[{layer: 2, body: norm}]"))
INFERENCE = Inference("llama3.1_8b", "full", tokens=2)


@contextlib.contextmanager
def tap_on_the_host() -> Iterator[None]:
    """A tensor on the host among those on the device."""
    import torch

    from megatron_ee.model.layer import DecoderLayer

    half = DecoderLayer.mlp_half

    def mlp_half(self: Any, r: torch.Tensor) -> torch.Tensor:
        return half(self, r) + torch.ones(r.shape, dtype=r.dtype)

    with mock.patch.object(DecoderLayer, "mlp_half", mlp_half):
        yield


@contextlib.contextmanager
def first_device() -> Iterator[None]:
    """A tensor on another rank's device."""
    import torch

    from megatron_ee.exits.exit import Exit

    forward = Exit.forward

    def elsewhere(self: Exit, *args: Any, **kwargs: Any) -> Any:
        torch.zeros(8, device="cuda:0")
        return forward(self, *args, **kwargs)

    with mock.patch.object(Exit, "forward", elsewhere):
        yield


@contextlib.contextmanager
def host_tensor_in_a_collective() -> Iterator[None]:
    """What NCCL refuses."""
    import torch
    import torch.distributed as dist

    from megatron_ee.parallel.optimizer import ExitOptimizer

    reduce = ExitOptimizer.reduce_gradients

    def reduce_gradients(self: ExitOptimizer) -> None:
        dist.all_reduce(torch.zeros(1), group=self.groups.tensor)
        reduce(self)

    with mock.patch.object(ExitOptimizer, "reduce_gradients", reduce_gradients):
        yield


@contextlib.contextmanager
def read_value() -> Iterator[None]:
    """A value that is read for each exit."""
    from megatron_ee.exits.exit import Exit

    forward = Exit.forward

    def reading(self: Exit, *args: Any, **kwargs: Any) -> Any:
        loss, stats = forward(self, *args, **kwargs)
        stats.loss.sum().item()
        return loss, stats

    with mock.patch.object(Exit, "forward", reading):
        yield


@contextlib.contextmanager
def read_each_row() -> Iterator[None]:
    """A value that is read for each row, beside the one transfer for all rows."""
    import torch

    from megatron_ee.inference import heads

    greedy = heads._greedy

    def reading(*args: Any) -> heads.Answer:
        torch.zeros(1, device="cuda").item()
        return greedy(*args)

    with mock.patch.object(heads, "_greedy", reading):
        yield


@contextlib.contextmanager
def unplanned_copy() -> Iterator[None]:
    """A float32 copy of the exits' weights, as some optimizers keep."""
    from megatron_ee.parallel.optimizer import ExitOptimizer

    make = ExitOptimizer.__init__

    def initialise(self: ExitOptimizer, exits: Any, *args: Any) -> None:
        make(self, exits, *args)
        self.copies = [p.detach().float() for exit_ in exits for p in exit_.parameters()]  # type: ignore[attr-defined]

    with mock.patch.object(ExitOptimizer, "__init__", initialise):
        yield


@contextlib.contextmanager
def unplanned_cache() -> Iterator[None]:
    """A cache with twice the room that is claimed for it."""
    from megatron_ee.inference.kv_cache import Extent

    room = Extent.room

    with mock.patch.object(Extent, "room", lambda self, length: 2 * room(self, length)):
        yield


def test_without_a_fault(worker: Worker) -> None:
    assert problems(worker.run(TUNING)) == []
    assert problems(worker.run(INFERENCE)) == []


def test_a_tensor_on_the_host(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="two devices, cuda:1 and cpu"):
        worker.run(TUNING, fault=tap_on_the_host)


@pytest.mark.parametrize(
    ("case", "fault", "found"),
    [
        (TUNING, first_device, "device: tuning/step.py tuning_step: a tensor on cuda:0, not cuda:1"),
        (TUNING, host_tensor_in_a_collective, "device: tuning/step.py tuning_step: a tensor on cpu in a collective of"),
        (TUNING, read_value, "host sync: tuning/step.py tuning_step: 1 of kind read, which host_syncs.toml does not"),
        (
            INFERENCE,
            read_each_row,
            "host sync: inference/heads.py head_outputs: 4 of kind read; host_syncs.toml allows 2 here",
        ),
        (TUNING, unplanned_copy, "memory: "),
        (INFERENCE, unplanned_cache, "memory: "),
    ],
)
def test_a_fault(case: Tuning | Inference, fault: Fault, found: str, worker: Worker) -> None:
    lines = problems(worker.run(case, fault=fault))
    assert [line[: len(found)] for line in dict.fromkeys(lines)] == [found]


def test_more_host_syncs_than_are_allowed() -> None:
    (read,) = [entry for entry in allowed("tune") if entry.where == "tuning/step.py _over_all_ranks"]
    units = {"step": 1, "microbatch": 2}
    result = Result("tune x", "", 1, 1, 0, {(read.where, read.kind): read.most}, units, {}, (), {})
    assert not_allowed(result) == []
    more = dataclasses.replace(result, syncs={(read.where, read.kind): read.most + 1})
    assert not_allowed(more) == [f"{read.where}: {read.most + 1} of kind read; host_syncs.toml allows {read.most} here"]


def test_attention_that_holds_all_scores() -> None:
    result = Result("tune x", "", 1, 1, 0, {}, {}, {"flash": 2, "math": 1}, (), {})
    assert problems(result) == ["attention: 1 calls hold all scores at once"]


@pytest.mark.parametrize(
    ("what", "units"),
    [("tune", {"step", "microbatch"}), ("fit", {"exit"}), ("infer", {"head", "gate"})],
)
def test_the_list_of_host_syncs(what: str, units: set[str]) -> None:
    for entry in allowed(what):
        assert entry.per in units and entry.most > 0 and entry.reason, entry
