"""A tuning step that several processes share, and these processes. This module imports no torch."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_ee.benchmark.shape import Shape, spread_exits
from megatron_ee.benchmark.worker import Worker, call_all, start_worker
from megatron_ee.config.architecture import Architecture, parse_architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import DistillationConfig, Head
from megatron_ee.errors import ConfigError
from megatron_ee.parallel.balance import balance
from megatron_ee.parallel.layout import Layout
from megatron_ee.parallel.memory import Workload
from megatron_ee.parallel.plan import ITEMSIZES, Plan, make_plan


@dataclass(frozen=True)
class ParallelStep:
    """What is tuned, and how it is spread.

    Attributes:
        specs: the exits.
        dtype: ``float32`` or ``bfloat16``.
    """

    architecture: Architecture
    specs: tuple[ExitSpec, ...]
    layout: Layout
    workload: Workload
    dtype: str

    @property
    def world_size(self) -> int:
        """Number of processes; the ranks of stage ``s`` are those that leave ``s`` when divided by ``tensor``."""
        return len(self.layout.stages) * self.workload.tensor

    @property
    def plan(self) -> Plan:
        """What each stage should hold, compute and wait for."""
        return make_plan(self.layout, self.architecture, self.specs, self.workload)

    def describe(self) -> dict[str, Any]:
        """What stands beside the figures."""
        arch, workload = self.architecture, self.workload
        return {
            "hidden": arch.hidden_size,
            "layers": arch.num_layers,
            "ffn": arch.ffn_size,
            "heads": arch.num_heads,
            "vocab": arch.vocab_size,
            "exits": [[spec.layer, spec.body, spec.head] for spec in self.specs],
            "stages": [[list(stage.layers), list(stage.exits)] for stage in self.layout.stages],
            "tensor": workload.tensor,
            "sequence_parallel": workload.sequence_parallel,
            "distillation": workload.top_k > 0,
            "sequence_length": workload.sequence_length,
            "microbatches": workload.microbatches,
            "dtype": self.dtype,
        }


def exit_specs(count: int, layers: int, *, mlp: int, head: Head) -> tuple[ExitSpec, ...]:
    """``count`` exits spread over 3/4 of ``layers``, the deepest ``mlp`` of them with an MLP, the others a norm.

    Raises:
        ConfigError: so many do not fit.
    """
    places = spread_exits(count, layers)
    return tuple(
        ExitSpec(layer, "mlp" if number >= count - mlp else "norm", head) for number, layer in enumerate(places)
    )


def parallel_step(
    shape: Shape,
    specs: Sequence[ExitSpec],
    *,
    stages: int = 1,
    tensor: int = 1,
    sequence_parallel: bool = False,
    distillation: bool = False,
    dtype: str,
    tokens: int,
    microbatches: int,
) -> ParallelStep:
    """A step of ``microbatches`` sequences of ``tokens`` on a model of ``shape`` with a head of its own.

    Layers and exits are balanced over the stages by counted FLOPs.

    Raises:
        ConfigError: the model cannot be, or cannot be spread like that.
    """
    shape.check()
    if shape.heads % tensor or shape.ffn % tensor:
        raise ConfigError(f"--tensor: {tensor} does not divide {shape.heads} heads and {shape.ffn} MLP features")
    if sequence_parallel and (tensor == 1 or tokens % tensor):
        raise ConfigError(f"--sequence-parallel: needs --tensor above 1, of which {tokens} tokens are a multiple")
    architecture = parse_architecture(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "vocab_size": shape.vocab,
        }
    )
    workload = Workload(
        itemsize=ITEMSIZES[dtype],
        tensor=tensor,
        sequence_parallel=sequence_parallel,
        sequence_length=tokens,
        microbatches=microbatches,
        top_k=min(DistillationConfig.top_k, shape.vocab) if distillation else 0,
    )
    layout = balance(architecture, specs, stages, tokens, distillation=distillation, tensor=tensor)
    return ParallelStep(architecture, tuple(specs), layout, workload, dtype)


@contextlib.contextmanager
def started_ranks(
    step: ParallelStep, *, on_host: bool, environment: dict[str, str] | None = None
) -> Iterator[list[Worker]]:
    """A process for each rank, in order, that has met the others and holds its part of the model (``rank.Rank``).

    Args:
        on_host: on CPU cores, one thread each, also where there is an accelerator.
        environment: variables that the processes start with, besides this one's.

    Raises:
        UserError: a process did not survive, or there are fewer devices than ranks.
    """
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="megatron-ee-") as directory,
        mock.patch.dict(os.environ, environment or {}),
        contextlib.ExitStack() as stack,
    ):
        make, lock = "megatron_ee.benchmark.rank:rank", str(Path(directory) / "lock")
        workers = [
            stack.enter_context(start_worker(f"rank {number}", make, step, number, port, lock, on_host, wait=False))
            for number in range(step.world_size)
        ]
        call_all(workers, "prepare")
        yield workers


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launcher_environment(number: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells rank ``number`` of the processes on this machine that meet at ``port``."""
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
