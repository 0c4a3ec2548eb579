"""Bytes that the ranks of a stage send over each kind of link. Pure: no process group is needed.

A reduction over n ranks is counted as a ring: reduce-scatter and all-gather of S bytes send (n - 1) / n S each, an
all-reduce twice this. Numbers of a few bytes per token, such as those of a vocabulary-parallel loss, are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.registry import body_of, tap_of, trains
from megatron_ee.parallel.layout import Layout
from megatron_ee.planning.activations import hidden_bytes
from megatron_ee.planning.parameters import hosted_by, trained_parameters
from megatron_ee.planning.workload import FLOAT32, Workload


@dataclass(frozen=True)
class StageTraffic:
    """Bytes that each rank of a stage sends.

    Attributes:
        messages: per microbatch, by the stage that a message goes to: h and taps, and teacher messages.
        layers: per microbatch, to tensor-parallel ranks, in the frozen layers.
        exits: per microbatch, to tensor-parallel ranks, in the exits.
        gradients: per step, to data-parallel ranks: of each exit, by its layer.
        weights: per step, to data-parallel ranks, after the update.
    """

    messages: dict[int, int]
    layers: int
    exits: int
    gradients: dict[int, int]
    weights: int

    def per_step(self, microbatches: int) -> tuple[int, int, int]:
        """Bytes of one step: between stages, between tensor-parallel ranks, between data-parallel ranks."""
        between = microbatches * sum(self.messages.values())
        tensor = microbatches * (self.layers + self.exits)
        return between, tensor, sum(self.gradients.values()) + self.weights


def stage_traffic(
    layout: Layout, index: int, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload
) -> StageTraffic:
    """Traffic of each rank of stage ``index``; ``specs``: the exits of all stages."""
    hosted = [spec for spec in hosted_by(layout.stages[index], specs) if trains(spec)]
    share, data = _share(workload.tensor), _share(workload.data)
    whole = workload.tokens * architecture.hidden_size * workload.itemsize
    trained = {spec.layer: trained_parameters(architecture, spec, workload.tensor) for spec in hosted}
    return StageTraffic(
        messages=_messages(layout, index, architecture, workload),
        layers=int(share * whole * _layer_passes(layout, index, specs, workload)),
        exits=int(share * whole * sum(_exit_passes(spec, workload) for spec in hosted)),
        gradients={layer: int(data * count * FLOAT32) for layer, count in trained.items()},
        weights=int(data * sum(trained.values()) * workload.itemsize),
    )


def _share(ranks: int) -> float:
    """Share of a tensor that a rank of a ring sends in one pass around it."""
    return (ranks - 1) / ranks


def _messages(layout: Layout, index: int, architecture: Architecture, workload: Workload) -> dict[int, int]:
    hidden, found = hidden_bytes(architecture, workload), dict[int, int]()
    for message in layout.messages:
        if message.source == index:
            found[message.target] = (message.hidden + len(message.taps)) * hidden
    if workload.top_k and index == layout.last_layered:
        for target, stage in enumerate(layout.stages):
            if stage.exits and target != index:
                teacher = 2 * FLOAT32 * workload.tokens * workload.top_k
                found[target] = found.get(target, 0) + teacher
    return found


def _layer_passes(layout: Layout, index: int, specs: Sequence[ExitSpec], workload: Workload) -> int:
    """Passes of a microbatch's hidden states around the ring of tensor-parallel ranks, in the frozen layers.

    Both halves of a layer take two: an all-reduce, or with sequence parallelism an all-gather and a reduce-scatter. The
    embedding takes two, or one; the final exit as a teacher one with sequence parallelism.
    """
    layers = layout.stages[index].layers
    passes = 4 * len(layers)
    if not layers:
        return 0
    last = index == layout.last_layered
    if last and not workload.top_k and all(tap_of(spec) == "residual" for spec in specs if spec.layer == layers[-1]):
        passes -= 2
    if 1 in layers:
        passes += 1 if workload.sequence_parallel else 2
    return passes + (last and workload.top_k > 0 and workload.sequence_parallel)


def _exit_passes(spec: ExitSpec, workload: Workload) -> int:
    """The same in an exit: of its body, of gathering the head's input, and of the gradient of this input."""
    body = body_of(spec)
    return body.ring_passes(workload.sequence_parallel) + workload.sequence_parallel + 2 * bool(body.saved)
