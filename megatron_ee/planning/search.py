"""Searches other ways to run a configuration on a number of GPUs, and says why some do not fit.

The result of tuning does not depend on parallelism, micro-batch, and where layers are, so these are searched first. A
shared head trains less. Quantised layers have other hidden states, which exits then learn. Both are offered only where
fewer than three ways fit without them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.check import largest_tensor
from megatron_ee.config.schema import Quantise, RunConfig
from megatron_ee.errors import ConfigError
from megatron_ee.families.quantisation import fits_groups
from megatron_ee.planning.blame import blame, blame_host
from megatron_ee.planning.devices import GPUS_PER_MACHINE
from megatron_ee.planning.estimate import Estimate, estimate_run
from megatron_ee.planning.machine import Machine
from megatron_ee.planning.parameters import input_features

BEST = 3
KINDS: tuple[Quantise, ...] = get_args(Quantise)
"""Of quantisation, by the memory that is saved and by how much hidden states change."""
Overrides = dict[str, Any]
"""Values by dotted key."""


@dataclass(frozen=True)
class Limits:
    """Memory that a run may take.

    Attributes:
        gpu: bytes of one GPU.
        host: bytes of the host of one machine; None if that is not known, and not checked.
    """

    gpu: float
    host: float | None = None

    def short(self, estimate: Estimate) -> tuple[float, float]:
        """Bytes that a GPU lacks, and the host of a machine; 0 for enough."""
        host = 0.0 if self.host is None else max(0.0, estimate.host_needed - self.host)
        return max(0.0, estimate.needed - self.gpu), host

    def hold(self, estimate: Estimate) -> bool:
        """Whether it fits."""
        return self.short(estimate) == (0.0, 0.0)


@dataclass(frozen=True)
class Candidate:
    """One way to run the configuration.

    Attributes:
        changes: what differs from the configuration as it is written.
        estimate: of the changed configuration.
        less: whether the changes train less than what is written.
        rounded: how the changes quantise layers, if they do; empty if not.
    """

    changes: Overrides
    estimate: Estimate
    less: bool = False
    rounded: Quantise | Literal[""] = ""

    @property
    def same_result(self) -> bool:
        """Whether it tunes the same exits on the same hidden states as what is written."""
        return not self.less and not self.rounded

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
        short: bytes that a GPU lacks, or the host of a machine; 0 if another reason is given.
        host: whether the host lacks them.
        reason: what takes the memory, or what does not divide.
        remedy: changes with which it fits; None if none was found.
    """

    tensor: int
    pipeline: int
    short: float
    host: bool
    reason: str
    remedy: Overrides | None


@dataclass(frozen=True)
class Search:
    """The best ways to run a configuration, fastest first, and the sizes that cannot be used."""

    best: tuple[Candidate, ...]
    misfits: tuple[Misfit, ...]


def search(config: RunConfig, architecture: Architecture, gpus: int, limits: Limits, machine: Machine | None) -> Search:
    """Search all sizes for ``gpus`` GPUs.

    Args:
        config: as written, its ``model.dtype`` resolved.
        architecture: of the model.
        gpus: number of processes.
        limits: of memory.
        machine: what times rest on. Without one, candidates are compared by their FLOPs and idle time.
    """
    space = _Space(config, architecture, gpus, machine or _free_links())
    fitting, misfits, possible = list[Candidate](), list[Misfit](), list[tuple[int, int]]()
    for tensor, pipeline in _sizes(config, architecture, gpus):
        try:
            found = list(space.candidates(tensor, pipeline, space.same_results(pipeline)))
        except ConfigError as error:
            misfits.append(Misfit(tensor, pipeline, 0.0, False, str(error), None))
            continue
        possible.append((tensor, pipeline))
        fitting += _fastest([each for each in found if limits.hold(each.estimate)])
        resident = [each for each in found if each.estimate.workload.residency == "device"]
        least = min(resident, key=lambda each: (limits.short(each.estimate), each.estimate.needed))
        if not limits.hold(least.estimate):
            misfits.append(_misfit(least, space, limits))
    if len(fitting) < BEST:
        for tensor, pipeline in possible:
            found = list(space.candidates(tensor, pipeline, space.other_results(pipeline)))
            fitting += _fastest([each for each in found if limits.hold(each.estimate)])
    fitting.sort(key=_order)
    best = fitting[:BEST]
    if machine is None:
        best = [dataclasses.replace(each, estimate=_without_times(each.estimate)) for each in best]
    return Search(tuple(best), tuple(misfits))


def _sizes(config: RunConfig, architecture: Architecture, gpus: int) -> Iterator[tuple[int, int]]:
    """Tensor and pipeline sizes that divide the GPUs and the model."""
    largest = largest_tensor(architecture)
    most = architecture.num_layers + len(config.exits)
    for tensor in range(1, min(gpus, largest) + 1):
        if gpus % tensor or largest % tensor:
            continue
        for pipeline in range(1, min(most, gpus // tensor) + 1):
            if (gpus // tensor) % pipeline == 0:
                yield tensor, pipeline


@dataclass(frozen=True)
class _Space:
    """What is searched. ``rates``: what times rest on."""

    config: RunConfig
    architecture: Architecture
    gpus: int
    rates: Machine

    def candidates(self, tensor: int, pipeline: int, settings: Sequence[Overrides]) -> Iterator[Candidate]:
        """Each of ``settings``, with every combination of sequence parallelism and micro-batch.

        Raises:
            ConfigError: no micro-batch divides the batch, or there are more stages than layers and exits.
        """
        config, replicas = self.config, self.gpus // (tensor * pipeline)
        batch = config.tuning.global_batch_size
        if batch % replicas:
            raise ConfigError(f"{replicas} data-parallel replicas do not divide tuning.global_batch_size {batch}")
        micros = [size for size in _powers(batch // replicas) if (batch // replicas) % size == 0]
        micros = sorted({*micros, config.tuning.micro_batch_size} if _divides(config, replicas) else micros)
        sequence = [False, True] if tensor > 1 and config.data.sequence_length % tensor == 0 else [False]
        for setting, split, micro in itertools.product(settings, sequence, micros):
            changes: Overrides = {
                "parallel.tensor": tensor,
                "parallel.pipeline": pipeline,
                "parallel.sequence": split,
                "parallel.layout": "auto",
                "tuning.micro_batch_size": micro,
            }
            yield self.candidate(config, changes | setting)

    def same_results(self, pipeline: int) -> list[Overrides]:
        """Where the layers' weights can be without a change of their values."""
        model = self.config.model
        quantised = self.architecture.packed_bits > 0 or model.quantise != "none"
        resident = ("packed", "expanded") if quantised else (model.weights,)
        found: list[Overrides] = [{"model.residency": "device", "model.weights": each} for each in resident]
        return found + [{"model.residency": each} for each in ("host", "disk") if pipeline == 1]

    def other_results(self, pipeline: int) -> list[Overrides]:
        """Shared heads, quantised layers, and both."""
        same, shared = self.same_results(pipeline), shared_heads(self.config)
        rounded = quantised_layers(self.config, self.architecture)
        return rounded + [each | shared for each in same + rounded if shared]

    def candidate(self, config: RunConfig, changes: Overrides) -> Candidate:
        """``config`` with changes. The candidate lists those that differ from the configuration as it is written."""
        changed = apply_changes(config, changes)
        differing = {key: value for key, value in changes.items() if _value(self.config, key) != value}
        rounding = changed.model.quantise
        return Candidate(
            differing,
            estimate_run(changed, self.architecture, self.gpus, self.rates),
            less=any(key.startswith("exits.") for key in differing),
            rounded=rounding if rounding != self.config.model.quantise else "",
        )


def shared_heads(config: RunConfig) -> Overrides:
    """Changes that share all heads that exits own, but for bodies that would then train nothing."""
    return {
        f"exits.{index}.head": "shared"
        for index, exit_ in enumerate(config.exits)
        if exit_.head == "own" and exit_.body != "embedding"
    }


def quantised_layers(config: RunConfig, architecture: Architecture) -> list[Overrides]:
    """Changes that quantise a plain model's layers, or quantise them more, as they are loaded; they stay packed.

    Streamed layers are expanded on the host, so they do not gain.
    """
    kinds = [kind for kind in KINDS if kind != "int4" or all(map(fits_groups, input_features(architecture)))]
    if architecture.packed_bits or config.model.quantise not in kinds:
        return []
    more = kinds[kinds.index(config.model.quantise) + 1 :]
    return [{"model.residency": "device", "model.weights": "packed", "model.quantise": kind} for kind in more]


def _misfit(least: Candidate, space: _Space, limits: Limits) -> Misfit:
    """Why a candidate does not fit, and the first remedy with which it does."""
    config, estimate = least.estimate.config, least.estimate
    on_gpu, on_host = limits.short(estimate)
    streamed = ("host", "disk") if config.parallel.pipeline == 1 else ()
    for_host: list[Overrides] = [{"checkpoint.asynchronous": False}, {"optimizer.implementation": "auto"}]
    for_gpu: list[Overrides] = [shared_heads(config), *({"model.residency": each} for each in streamed)]
    for_gpu += [{"optimizer.implementation": "deepspeed_cpu"}, _copied(estimate)]
    for_gpu += quantised_layers(config, space.architecture)
    options = for_gpu + for_host if on_gpu else for_host + for_gpu
    singles = [each for each in options if each]
    pairs = [first | second for first, second in itertools.combinations(singles, 2) if not first.keys() & second.keys()]
    remedies = (each for each in (*singles, *pairs) if limits.hold(space.candidate(config, each).estimate))
    return Misfit(
        config.parallel.tensor,
        config.parallel.pipeline,
        short=on_gpu or on_host,
        host=not on_gpu,
        reason=blame(estimate) if on_gpu else blame_host(estimate),
        remedy=next(remedies, None),
    )


def _copied(estimate: Estimate) -> Overrides:
    """Changes that fit no exit."""
    fitted = {spec.layer for spec in estimate.specs if spec.init == "fit"}
    return {f"exits.{index}.init": "copy" for index in range(len(estimate.config.exits))} if fitted else {}


def _fastest(fits: Sequence[Candidate]) -> list[Candidate]:
    """Of the candidates of one tensor and pipeline size, the fastest of each choice of heads and layers."""
    groups: dict[tuple[Any, ...], list[Candidate]] = {}
    for each in fits:
        model = each.estimate.config.model
        groups.setdefault((each.less, model.residency, model.weights, model.quantise), []).append(each)
    return [min(group, key=_order) for group in groups.values()]


def _order(candidate: Candidate) -> tuple[Any, ...]:
    """What changes the result least, then the fastest; of equal times the smallest change, then the least memory."""
    estimate = candidate.estimate
    assert estimate.step is not None, "candidates have times"
    workload = estimate.workload
    return (
        candidate.less + KINDS.index(candidate.rounded or "none"),
        float(f"{estimate.step.seconds:.3g}"),
        workload.tensor,
        len(estimate.layout.stages),
        len(candidate.changes),
        estimate.needed,
    )


def _without_times(estimate: Estimate) -> Estimate:
    return dataclasses.replace(estimate, machine=None)


def _free_links() -> Machine:
    """A machine on which only FLOPs take time."""
    inf = float("inf")
    return Machine("", inf, 1.0, 1.0, 1.0, 1.0, inf, inf, inf, inf, GPUS_PER_MACHINE, None, ())


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
