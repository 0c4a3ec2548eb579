"""What takes the memory of a plan, in words."""

from __future__ import annotations

import dataclasses

from megatron_ee.planning.devices import GB, HOST_RESERVED
from megatron_ee.planning.estimate import Estimate
from megatron_ee.planning.parameters import hosted_by, trained_parameters
from megatron_ee.planning.plan import StagePlan
from megatron_ee.tables import counted


def blame(estimate: Estimate) -> str:
    """The largest part of the memory of the rank that needs the most, such as ``the 7 own heads take 15.2 GB``."""
    index = max(range(len(estimate.plan.stages)), key=lambda place: estimate.plan.stages[place].memory.total)
    stage = estimate.plan.stages[index]
    memory, layers = stage.memory, estimate.architecture.num_layers
    where = f" on stage {index}" if len(estimate.plan.stages) > 1 else ""
    if memory.total == memory.tuning:
        parts = _parts(estimate, index, stage)
        name, size = max(parts.items(), key=lambda part: part[1])
        return f"{name}{where} take {size / GB:,.1f} GB"
    phases = (
        (memory.fit, f"the fit before tuning, which holds all {layers} layers, takes"),
        (memory.validation, f"all {layers} layers, for the final exit on validation data, take"),
        (memory.gates, f"the fit of gates, which holds all {layers} layers, takes"),
        (memory.decoding, f"threshold mode after tuning, which holds all {layers} layers, takes"),
    )
    words = next(words for size, words in phases if size == memory.total)
    return f"{words} {memory.total / GB:,.1f} GB{where}"


def blame_host(estimate: Estimate) -> str:
    """The largest part of the host memory of all ranks, such as ``40 streamed layers take 25.4 GB``."""
    host, layers = estimate.host, estimate.architecture.num_layers
    processes = counted(estimate.gpus, "process", "processes")
    parts = {
        f"{layers} streamed layers take": host.layers,
        "the optimizer's state takes": host.optimizer,
        "the copy of a checkpoint takes": host.checkpoint,
        "the tokens that gates are fitted on take": host.gates,
        f"Python with its libraries, in {processes}, takes": estimate.gpus * HOST_RESERVED,
    }
    words, size = max(parts.items(), key=lambda part: part[1])
    return f"{words} {size / GB:,.1f} GB"


def _parts(estimate: Estimate, index: int, stage: StagePlan) -> dict[str, float]:
    """Bytes by what they belong to, while tuning."""
    memory, tensor, arch = stage.memory, estimate.workload.tensor, estimate.architecture
    parts: dict[str, float] = {
        f"{len(stage.layers)} {'packed' if estimate.workload.packed_bits else 'frozen'} layers": memory.frozen,
        "taps and activations": memory.taps + memory.activations,
        "buffers of messages": memory.transfer,
    }
    hosted = hosted_by(estimate.layout.stages[index], estimate.specs)
    if not stage.trained_parameters:
        return parts
    each = (memory.trained + memory.gradients + memory.optimizer) / stage.trained_parameters
    heads = bodies = owned = 0
    for spec in hosted:
        body = trained_parameters(arch, dataclasses.replace(spec, head="shared"), tensor)
        heads, bodies = heads + trained_parameters(arch, spec, tensor) - body, bodies + body
        owned += spec.head == "own"
    parts[f"the {counted(owned, 'own head')}"] = each * heads
    parts[f"the {counted(len(hosted), 'exit body', 'exit bodies')}"] = each * bodies
    return parts
