"""Bytes that a run writes to disk, and that it needs in host memory. Pure: no process group is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import RunConfig
from megatron_ee.exits.fit import PER_FEATURE
from megatron_ee.exits.tensors import exit_parts, saved_parts
from megatron_ee.planning.parameters import layer_parameters
from megatron_ee.planning.workload import FLOAT32, Workload

HOST_OPTIMIZER = 4 * FLOAT32
"""Bytes of an optimizer in host memory for each weight: gradient, main weight and two moments."""
LOSS_AND_TOKEN = 12
"""Bytes for each validation token in the cache: a float32 loss and an int64 top-1 token."""


@dataclass(frozen=True)
class DiskUse:
    """Bytes of a run on disk, but for logs and plots of some megabytes.

    Attributes:
        checkpoint: one training checkpoint.
        checkpoints: number that is kept.
        adapter: the exits alone.
        adapters: number of them: the last, the best with validation, and fitted ones.
        cache: the final exit's results on the validation data, in the cache directory.
    """

    checkpoint: int
    checkpoints: int
    adapter: int
    adapters: int
    cache: int

    @property
    def most(self) -> int:
        """The most at a time: a checkpoint is complete before the oldest is deleted, and so are adapters."""
        return (self.checkpoints + 1) * self.checkpoint + (self.adapters + 1) * self.adapter + self.cache


def disk_use(config: RunConfig, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload) -> DiskUse:
    """What the run of a checked configuration writes."""
    trained, matrices = _trained(architecture, specs), _trained(architecture, specs, matrices=True)
    saved = sum(part.elements for spec in specs for part in saved_parts(spec, architecture))
    rest = workload.remainder if workload.itemsize < FLOAT32 else 0
    state = trained * (workload.itemsize + 2 * FLOAT32 + rest)
    if workload.keeps_initial:
        state += matrices * workload.itemsize
    sequences = config.validation.sequences if workload.validates else 0
    return DiskUse(
        checkpoint=state,
        checkpoints=min(config.checkpoint.keep, saves(config)),
        adapter=trained * workload.itemsize + (saved - trained) * FLOAT32,
        adapters=workload.adapters + any(spec.init == "fit" for spec in specs),
        cache=sequences * workload.sequence_length * LOSS_AND_TOKEN,
    )


def saves(config: RunConfig) -> int:
    """Number of training checkpoints that a run writes, the last one included."""
    interval, steps = config.checkpoint.interval, config.tuning.steps
    return 1 + (max(0, steps - 1) // interval if interval else 0)


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory of all ranks together, besides what Python and its libraries take.

    Attributes:
        layers: streamed layers: all of each replica, or one of each rank on its way from the disk.
        optimizer: gradients, main weights and moments, if they are in host memory.
        checkpoint: the copy of a checkpoint that is written meanwhile.
        gates: the tokens that gates are fitted on, of all adapters that are fitted together.
        gates_while_tuning: whether this is done while tuning, with distillation, or after it.
    """

    layers: int = 0
    optimizer: int = 0
    checkpoint: int = 0
    gates: int = 0
    gates_while_tuning: bool = False

    @property
    def total(self) -> int:
        """Tuning, or the fit of gates after it if that takes more."""
        tuning = self.optimizer + self.checkpoint
        return self.layers + (tuning + self.gates if self.gates_while_tuning else max(tuning, self.gates))


def host_memory(
    config: RunConfig, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload
) -> HostMemory:
    """What the run of a checked configuration holds in host memory."""
    gates = sum(spec.gate for spec in specs) * (1 if workload.top_k else workload.adapters)
    layers = {"device": 0, "host": architecture.num_layers, "disk": 1}[workload.residency]
    asynchronous = config.checkpoint.asynchronous
    return HostMemory(
        layers=layers * layer_parameters(architecture) * workload.itemsize * workload.data,
        optimizer=_trained(architecture, specs) * HOST_OPTIMIZER if workload.host_optimizer else 0,
        checkpoint=disk_use(config, architecture, specs, workload).checkpoint if asynchronous else 0,
        gates=gates * gate_tokens(config, architecture) * architecture.hidden_size * workload.itemsize,
        gates_while_tuning=workload.top_k > 0 and gates > 0,
    )


def gate_tokens(config: RunConfig, architecture: Architecture) -> int:
    """Tokens that gates are fitted on; a corpus may have fewer."""
    most = PER_FEATURE * architecture.hidden_size
    return most if config.fit.tokens == "auto" else min(most, config.fit.tokens)


def _trained(architecture: Architecture, specs: Sequence[ExitSpec], *, matrices: bool = False) -> int:
    parts = (part for spec in specs for part in exit_parts(spec, architecture))
    return sum(part.elements for part in parts if not matrices or len(part.shapes[0]) > 1)
