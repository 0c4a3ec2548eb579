"""Searches other ways to run a configuration on a number of GPUs, and says why some do not fit.

The result of tuning does not depend on parallelism and micro-batch, so these are searched first. A shared head trains
less. It is offered where the exits as they are fit in fewer than three ways.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.check import largest_tensor
from megatron_ee.config.schema import RunConfig
from megatron_ee.errors import ConfigError
from megatron_ee.planning.blame import blame
from megatron_ee.planning.devices import memory_needed
from megatron_ee.planning.estimate import Estimate, estimate_run
from megatron_ee.planning.machine import Machine

BEST = 3
Overrides = dict[str, Any]
"""Values by dotted key."""


@dataclass(frozen=True)
class Candidate:
    """One way to run the configuration.

    Attributes:
        changes: what differs from the configuration as it is written.
        estimate: of the changed configuration.
        less: whether the changes train less than what is written.
    """

    changes: Overrides
    estimate: Estimate
    less: bool

    @property
    def needed(self) -> float:
        """Bytes that a GPU needs."""
        return memory_needed(self.estimate.memory)

    @property
    def arguments(self) -> list[str]:
        """The changes as options of ``tune``."""
        return [word for key, value in self.changes.items() for word in (f"--{key}", _written(value))]


@dataclass(frozen=True)
class Misfit:
    """Sizes that cannot be used.

    Attributes:
        tensor: tensor-parallel size.
        pipeline: number of stages.
        short: bytes that a GPU lacks; 0 if another reason is given.
        reason: what takes the memory, or what does not divide.
        remedy: changes with which it fits; None if none was found.
    """

    tensor: int
    pipeline: int
    short: float
    reason: str
    remedy: Overrides | None


@dataclass(frozen=True)
class Search:
    """The best ways to run a configuration, fastest first, and the sizes that cannot be used."""

    best: tuple[Candidate, ...]
    misfits: tuple[Misfit, ...]


def search(config: RunConfig, architecture: Architecture, gpus: int, memory: float, machine: Machine | None) -> Search:
    """Search all sizes for ``gpus`` GPUs with ``memory`` bytes each.

    Args:
        config: as written, its ``model.dtype`` resolved.
        architecture: of the model.
        gpus: number of processes.
        memory: bytes of one GPU.
        machine: what times rest on. Without one, candidates are compared by their FLOPs and idle time.
    """
    rates = machine or _free_links()
    fitting, misfits = list[Candidate](), list[Misfit]()
    for tensor, pipeline in _sizes(config, architecture, gpus):
        try:
            found = list(_candidates(config, architecture, gpus, tensor, pipeline, rates))
        except ConfigError as error:
            misfits.append(Misfit(tensor, pipeline, 0.0, str(error), None))
            continue
        fits = [each for each in found if each.needed <= memory]
        fitting += _fastest(fits)
        resident = [each for each in found if not each.less and each.estimate.workload.residency == "device"]
        least = min(resident, key=lambda each: each.needed)
        if least.needed > memory:
            misfits.append(_misfit(least, architecture, gpus, memory, rates))
    fitting.sort(key=_order)
    best = fitting[:BEST]
    if machine is None:
        best = [dataclasses.replace(each, estimate=_without_times(each.estimate)) for each in best]
    return Search(tuple(best), tuple(misfits))


def _sizes(config: RunConfig, architecture: Architecture, gpus: int) -> Iterator[tuple[int, int]]:
    """Tensor and pipeline sizes that divide the GPUs and the model."""
    largest = largest_tensor(architecture)
    most = architecture.num_layers + len(config.exits)
    for tensor in range(1, gpus + 1):
        if gpus % tensor or largest % tensor:
            continue
        for pipeline in range(1, min(most, gpus // tensor) + 1):
            if (gpus // tensor) % pipeline == 0:
                yield tensor, pipeline


def _candidates(
    config: RunConfig, architecture: Architecture, gpus: int, tensor: int, pipeline: int, rates: Machine
) -> Iterator[Candidate]:
    """Every combination of the other settings.

    Raises:
        ConfigError: no micro-batch divides the batch, or there are more stages than layers and exits.
    """
    replicas, batch = gpus // (tensor * pipeline), config.tuning.global_batch_size
    if batch % replicas:
        raise ConfigError(f"{replicas} data-parallel replicas do not divide tuning.global_batch_size {batch}")
    micros = [size for size in _powers(batch // replicas) if (batch // replicas) % size == 0]
    micros = sorted({*micros, config.tuning.micro_batch_size} if _divides(config, replicas) else micros)
    sequence = [False, True] if tensor > 1 and config.data.sequence_length % tensor == 0 else [False]
    heads = (
        [False, True] if any(exit_.head == "own" and exit_.body != "embedding" for exit_ in config.exits) else [False]
    )
    residencies = ["device", "host", "disk"] if pipeline == 1 else ["device"]
    for shared, residency, split, micro in itertools.product(heads, residencies, sequence, micros):
        changes: Overrides = {
            "parallel.tensor": tensor,
            "parallel.pipeline": pipeline,
            "parallel.sequence": split,
            "parallel.layout": "auto",
            "tuning.micro_batch_size": micro,
            "model.residency": residency,
        }
        if shared:
            changes |= shared_heads(config)
        yield _candidate(config, changes, architecture, gpus, rates, less=shared)


def shared_heads(config: RunConfig) -> Overrides:
    """Changes that share all heads that exits own, but for bodies that would then train nothing."""
    return {
        f"exits.{index}.head": "shared"
        for index, exit_ in enumerate(config.exits)
        if exit_.head == "own" and exit_.body != "embedding"
    }


def _misfit(least: Candidate, architecture: Architecture, gpus: int, memory: float, rates: Machine) -> Misfit:
    """Why a candidate does not fit, and the first remedy with which it does."""
    config, estimate = least.estimate.config, least.estimate
    streamed = {"model.residency": "host"} if config.parallel.pipeline == 1 else {}
    host_optimizer = {"optimizer.implementation": "deepspeed_cpu"}
    options = (shared_heads(config), streamed, host_optimizer, _copied(estimate))
    singles: list[Overrides] = [each for each in options if each]
    pairs = [first | second for first, second in itertools.combinations(singles, 2)]
    remedy = None
    for changes in (*singles, *pairs):
        if _candidate(config, changes, architecture, gpus, rates, less=False).needed <= memory:
            remedy = changes
            break
    short = least.needed - memory
    sizes = estimate.config.parallel
    return Misfit(sizes.tensor, sizes.pipeline, short, blame(estimate), remedy)


def _copied(estimate: Estimate) -> Overrides:
    """Changes that fit no exit."""
    fitted = {spec.layer for spec in estimate.specs if spec.init == "fit"}
    return {f"exits.{index}.init": "copy" for index in range(len(estimate.config.exits))} if fitted else {}


def _candidate(
    config: RunConfig, changes: Overrides, architecture: Architecture, gpus: int, rates: Machine, *, less: bool
) -> Candidate:
    changed = apply_changes(config, changes)
    differing = {key: value for key, value in changes.items() if _value(config, key) != value}
    return Candidate(differing, estimate_run(changed, architecture, gpus, rates), less)


def _fastest(fits: Sequence[Candidate]) -> list[Candidate]:
    """Of the candidates of one tensor and pipeline size, the fastest of each residency and choice of heads."""
    groups: dict[tuple[bool, str], list[Candidate]] = {}
    for each in fits:
        groups.setdefault((each.less, each.estimate.workload.residency), []).append(each)
    return [min(group, key=_order) for group in groups.values()]


def _order(candidate: Candidate) -> tuple[Any, ...]:
    """Fastest first; of equal times the smallest change, then the least memory."""
    estimate = candidate.estimate
    assert estimate.step is not None, "candidates have times"
    workload = estimate.workload
    seconds = float(f"{estimate.step.seconds:.3g}")
    return (
        candidate.less,
        seconds,
        workload.tensor,
        len(estimate.layout.stages),
        len(candidate.changes),
        candidate.needed,
    )


def _without_times(estimate: Estimate) -> Estimate:
    return dataclasses.replace(estimate, machine=None)


def _free_links() -> Machine:
    """A machine on which only FLOPs take time."""
    inf = float("inf")
    return Machine("", inf, 1.0, 1.0, 1.0, 1.0, inf, inf, inf, inf, 2**31, None, ())


def _powers(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2


def _divides(config: RunConfig, replicas: int) -> bool:
    return config.tuning.global_batch_size % (replicas * config.tuning.micro_batch_size) == 0


def apply_changes(config: RunConfig, changes: Overrides) -> RunConfig:
    """The configuration with other values at dotted keys."""
    result: Any = config
    for key, value in changes.items():
        result = _replaced(result, key.split("."), value)
    return result


def _replaced(block: Any, path: Sequence[str], value: Any) -> Any:
    first, *rest = path
    if isinstance(block, list):
        index = int(first)
        return [*block[:index], _replaced(block[index], rest, value), *block[index + 1 :]]
    return dataclasses.replace(block, **{first: _replaced(getattr(block, first), rest, value) if rest else value})


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else getattr(value, part)
    return value


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
