"""Memory of one rank of a stage, by kind and by phase.

Weights, gradients and optimizer state are counted exactly, except for megatron-core's alignment of each tensor. Taps
and activations are counted at their peak. The memory of CUDA, the communication library and allocator fragmentation are
not counted. Pure: no process group is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.fit import FLOAT64, RIDGES, fit_bytes
from megatron_ee.exits.gate import newton_bytes
from megatron_ee.exits.registry import body_of
from megatron_ee.exits.tensors import parameter_sizes
from megatron_ee.parallel.layout import Layout, StageLayout
from megatron_ee.parallel.tiles import UPDATE_RUN
from megatron_ee.planning.activations import (
    activation_peak,
    by_layer,
    decode_bytes,
    fit_peak,
    hidden_bytes,
    layer_peak,
    statistics_bytes,
)
from megatron_ee.planning.parameters import (
    hosted_by,
    layer_bytes,
    layer_parameters,
    stage_parameters,
    trained_parameters,
)
from megatron_ee.planning.workload import FLOAT32, Workload


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        frozen: backbone, and the frozen norms and LM head that exits use.
        trained: weights of the exits.
        gradients: float32 gradients of the exits. If the optimizer state is in host memory and exits are trained one
            after the other, those of the largest exit: each exit's go to the host when it is done.
        optimizer: two moments, the additional bytes of float32 main weights if the weights are bfloat16, and the
            initial values if weight decay goes towards them; 0 if they are in host memory.
        taps: taps of this stage's layers, until the exits that read them are done; where layers share memory, the
            hidden states of all microbatches too.
        activations: the largest of five, besides the taps: peak of one microbatch in the frozen layers, one exit's
            graph with the loss's scratch memory, the optimizer's scratch memory, decoding in validations, and solving
            for gates while tuning.
        transfer: buffers of messages from and to other stages.
        fit: all of the closed-form fit before tuning, whose stage is freed again; 0 if no exit is fitted.
        validation: all of the passes through all layers before tuning that validation needs, freed again; 0 without.
        gates: all of the pass that fits gates after tuning; 0 if no gates are fitted then.
        decoding: all of free-running threshold mode after tuning; 0 if it is not measured then.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    taps: int
    activations: int
    transfer: int
    fit: int = 0
    validation: int = 0
    gates: int = 0
    decoding: int = 0

    @property
    def tuning(self) -> int:
        """While tuning: the sum of all parts but the other phases."""
        held = self.frozen + self.trained + self.gradients + self.optimizer
        return held + self.taps + self.activations + self.transfer

    @property
    def total(self) -> int:
        """The largest phase."""
        return max(self.tuning, self.fit, self.validation, self.gates, self.decoding)


def stage_memory(
    layout: Layout, index: int, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload
) -> Memory:
    """Memory of each rank of stage ``index``; ``specs``: the exits of all stages."""
    whole = layout.whole
    frozen, trained = stage_parameters(whole, index, architecture, specs, workload.tensor, workload.final_exit)
    hosted = hosted_by(layout.stages[index], specs)
    taps = _taps(layout, index, architecture, specs, workload)
    activations = activation_peak(layout, index, architecture, specs, workload)
    # No tap is alive during the update, during validation, or when gates are solved for.
    others = [_update_bytes(architecture, hosted, trained, workload)]
    if workload.free_running:
        others.append(decode_bytes(architecture, whole.stages[index].layers, hosted, workload))
    if workload.top_k and any(spec.gate for spec in hosted):
        others.append(newton_bytes(architecture.hidden_size))
    every = layout.of_all(architecture.num_layers)
    return Memory(
        frozen=frozen_bytes(frozen, whole.stages[index], architecture, workload),
        trained=trained * workload.itemsize,
        gradients=_gradient_bytes(layout, architecture, hosted, trained, workload),
        optimizer=_optimizer_bytes(architecture, hosted, trained, workload),
        taps=taps,
        activations=max(activations, max(others) - taps),
        transfer=_transfer(layout, index, architecture, workload),
        fit=fit_memory(every, index, architecture, specs, workload),
        validation=validation_memory(every, index, architecture, workload),
        gates=gates_memory(every, index, architecture, specs, workload),
        decoding=decoding_memory(every, index, architecture, specs, workload),
    )


def fit_memory(
    layout: Layout, index: int, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload
) -> int:
    """Bytes of the closed-form fit on each rank of stage ``index``; 0 if no exit is fitted.

    ``layout`` has all layers, and the last stage with layers the final exit. Exits are counted as fitted and measured
    one at a time: if there is more memory, several are fitted together. The first tensor-parallel rank is counted,
    which solves for the others. A solution is kept for two shares.
    """
    if not any(spec.init == "fit" for spec in specs):
        return 0
    layout = layout.with_exits([spec.layer for spec in specs])
    frozen, trained = stage_parameters(layout, index, architecture, specs, workload.tensor, distillation=True)
    stage, hidden, size = layout.stages[index], hidden_bytes(architecture, workload), architecture.hidden_size
    layers = layer_peak(architecture, workload) if stage.layers else 0
    adding = solving = 0
    measuring = layers
    if stage.exits or index == layout.last_layered:
        measuring = max(measuring, 2 * hidden + statistics_bytes(architecture, workload))
    running = measuring
    for spec in (spec for spec in hosted_by(stage, specs) if spec.init == "fit"):
        rows = body_of(spec).fitted_rows(architecture) or 0
        sums, work = fit_bytes(rows, size, workload.tensor)
        own = -(-rows // workload.tensor) * size
        kept = len(RIDGES) * 2 * own * workload.itemsize
        adding = max(adding, sums + max(layers, fit_peak(architecture, rows, workload)))
        solving = max(solving, kept + sums + work + (workload.tensor > 1) * FLOAT64 * own)
        copied = own * workload.itemsize
        measuring = max(measuring, kept + copied + max(running, copied))  # or a copy that is interpolated
    buffers = 4 * hidden if len(layout.stages) > 1 else 0  # of messages to and from a neighbour, two each way
    # No tap is alive while a fit is solved.
    peak = max(max(adding, measuring) + _taught(layout, index, workload) * hidden, solving)
    weights = frozen_bytes(frozen, stage, architecture, workload) + trained * workload.itemsize
    return weights + peak + buffers


def validation_memory(layout: Layout, index: int, architecture: Architecture, workload: Workload) -> int:
    """Bytes of the passes through all layers that validation needs before tuning; 0 without validation.

    ``layout`` has all layers, and the last stage with layers the final exit. The passes are the final exit on the
    validation data, and the full model's continuations of prompts.
    """
    if not workload.validates:
        return 0
    frozen, _ = stage_parameters(layout, index, architecture, (), workload.tensor, distillation=True)
    stage, hidden = layout.stages[index], hidden_bytes(architecture, workload)
    embedded = hidden if 1 in stage.layers else 0
    if by_layer(layout, workload):  # as many hidden states as fill a slot
        embedded = max(hidden, layer_parameters(architecture, workload.tensor) * workload.itemsize)
    running = embedded + layer_peak(architecture, workload) if stage.layers else 0
    if index == layout.last_layered:
        running = max(running, 2 * hidden + statistics_bytes(architecture, workload))
    if workload.decodes:
        running = max(running, decode_bytes(architecture, stage.layers, (), workload))
    buffers = 4 * hidden if len(layout.stages) > 1 else 0
    return frozen_bytes(frozen, stage, architecture, workload) + running + buffers


def gates_memory(
    layout: Layout, index: int, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload
) -> int:
    """Bytes of the pass that fits gates after tuning, on each rank of stage ``index``; 0 if no exit gets one then.

    ``layout`` has all layers, and the last stage with layers the final exit. The exits of the last and the best adapter
    are there together.
    """
    if workload.top_k or not any(spec.gate for spec in specs):
        return 0
    layout = layout.with_exits([spec.layer for spec in specs])
    frozen, trained = stage_parameters(layout, index, architecture, specs, workload.tensor, distillation=True)
    backbone, _ = stage_parameters(layout, index, architecture, (), workload.tensor, distillation=True)
    stage, hidden = layout.stages[index], hidden_bytes(architecture, workload)
    running = layer_peak(architecture, workload) if stage.layers else 0
    if stage.exits or index == layout.last_layered:
        running = max(running, 2 * hidden + statistics_bytes(architecture, workload))
    running += _taught(layout, index, workload) * hidden + (4 * hidden if len(layout.stages) > 1 else 0)
    if any(spec.gate for spec in hosted_by(stage, specs)):
        running = max(running, newton_bytes(architecture.hidden_size))
    exits = trained + frozen - backbone  # with the head that they share
    adapters = workload.adapters * exits * workload.itemsize
    return frozen_bytes(backbone, stage, architecture, workload) + adapters + running


def decoding_memory(
    layout: Layout, index: int, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload
) -> int:
    """Bytes of free-running threshold mode after tuning, on each rank of stage ``index``; 0 if it is not measured then.

    ``layout`` has all layers, and the last stage with layers the final exit.
    """
    layout = layout.with_exits([spec.layer for spec in specs])
    skipped = workload.free_running or workload.residency == "disk" or not layout.decodes
    if skipped or not workload.decodes:
        return 0
    frozen, trained = stage_parameters(layout, index, architecture, specs, workload.tensor, distillation=True)
    stage = layout.stages[index]
    decoding = decode_bytes(architecture, stage.layers, hosted_by(stage, specs), workload)
    return frozen_bytes(frozen, stage, architecture, workload) + trained * workload.itemsize + decoding


def frozen_bytes(frozen: int, stage: StageLayout, architecture: Architecture, workload: Workload) -> int:
    """Bytes of a stage's frozen parameters that are on the device at a time: expanded ones, and packed layers."""
    absent = max(0, len(stage.layers) - workload.slots) if workload.slots else 0
    packed = 0
    if workload.packed_bits:
        each = layer_bytes(architecture, workload.itemsize, workload.packed_bits, workload.tensor)
        packed = len(stage.layers) * each
    return (frozen - absent * layer_parameters(architecture, workload.tensor)) * workload.itemsize + packed


def _taught(layout: Layout, index: int, workload: Workload) -> int:
    """Number of hidden states that are kept for the exits of a stage until the last layer has run, and its own."""
    exits = len(layout.stages[index].exits)
    if by_layer(layout, workload):
        return workload.microbatches * (exits + 1)
    return exits * (1 + layout.depth(layout.last_layered) - layout.depth(index))


def _taps(layout: Layout, index: int, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload) -> int:
    """Bytes of the taps of a microbatch; with distillation also of earlier ones, whose exits wait for the teacher."""
    stage = layout.stages[index]
    if by_layer(layout, workload):  # a tap is the hidden state that goes on, unless it waits for the teacher
        kept = 1 + (len(stage.exits) if workload.top_k else 0)
        return workload.microbatches * kept * hidden_bytes(architecture, workload)
    held = len([spec for spec in specs if spec.layer in stage.layers])
    if workload.top_k:
        held += layout.lag(index) * len([layer for layer in stage.exits if layer in stage.layers])
    return held * hidden_bytes(architecture, workload)


def _gradient_bytes(
    layout: Layout, architecture: Architecture, hosted: Sequence[ExitSpec], trained: int, workload: Workload
) -> int:
    in_turn = workload.microbatches == 1 or (by_layer(layout, workload) and not workload.top_k)
    if workload.host_optimizer and in_turn:
        trained = max((trained_parameters(architecture, spec, workload.tensor) for spec in hosted), default=0)
    return trained * FLOAT32


def _optimizer_bytes(architecture: Architecture, hosted: Sequence[ExitSpec], trained: int, workload: Workload) -> int:
    if workload.host_optimizer:
        return 0
    per_weight = 2 * FLOAT32 + (workload.remainder if workload.itemsize < FLOAT32 else 0)
    size = -(-trained // workload.data) * per_weight
    if workload.keeps_initial:
        decaying = (parameter_sizes(spec, architecture, workload.tensor, matrices=True) for spec in hosted)
        size += -(-sum(map(sum, decaying)) // workload.data) * workload.itemsize
    return size


def _update_bytes(architecture: Architecture, hosted: Sequence[ExitSpec], trained: int, workload: Workload) -> int:
    """Scratch bytes of the split optimizer: a piece of float32 main weights, twice while it is split or while weights
    decay towards initial values. With whole main weights, only the initial values of a piece."""
    whole = workload.remainder == FLOAT32
    if workload.itemsize == FLOAT32 or workload.host_optimizer or (whole and not workload.keeps_initial):
        return 0
    largest = max((size for spec in hosted for size in parameter_sizes(spec, architecture, workload.tensor)), default=0)
    return (1 if whole else 2) * FLOAT32 * min(UPDATE_RUN, largest, -(-trained // workload.data))


def _transfer(layout: Layout, index: int, architecture: Architecture, workload: Workload) -> int:
    """Buffers of the messages to and from a stage. A teacher message is two tensors of four bytes per kept token."""
    size, hidden = 0, hidden_bytes(architecture, workload)
    for message in layout.messages:
        ahead = max(1, layout.depth(message.target) - layout.depth(message.source) + 1)
        tensors = message.hidden + len(message.taps)
        if index == message.source:
            size += (ahead + 1) * tensors * hidden
        if index == message.target:
            size += (ahead + 1 + (layout.lag(index) if workload.top_k else 0)) * tensors * hidden
    students = [place for place, stage in enumerate(layout.stages) if stage.exits and place != layout.last_layered]
    messages = len(students) if index == layout.last_layered else int(index in students)
    return size + 2 * messages * 2 * workload.tokens * workload.top_k * FLOAT32
