"""A streamed backbone: layers come from host memory or from the model's files, each under the computation before it.

Two slots (``model.slots``) on the device hold the layer that computes and the one that comes next. On a GPU a file is
read into a page-locked buffer, and copied from there on a stream of its own. On a CPU it is read into the slot.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

from torch import Tensor

from megatron_ee import platform
from megatron_ee.errors import ConfigError
from megatron_ee.families.weights import layer_tensors
from megatron_ee.model.setup import ModelSetup
from megatron_ee.model.slots import Event, LayerSlots, Slot

Read = Callable[[int, Mapping[str, Tensor]], None]
"""Reads the weights of a layer, given its number, into tensors on the host by the layer's parameter names."""


def check_host_memory(setup: ModelSetup, layers: int, key: str, optimizer: int | None = None) -> None:
    """Check that what is to stay in host memory fits there, before it is read. Every rank calls this.

    Args:
        setup: of this rank.
        layers: number of layers that this rank needs.
        key: of the residency, for the message.
        optimizer: bytes of this rank's optimizer in host memory; None if it is on the device.

    Raises:
        ConfigError: what a machine's processes keep does not fit in its free memory; raised on all ranks.
    """
    kept = []  # setting, what it keeps in host memory, bytes of this rank, another value
    if setup.residency == "host":
        layer = sum(map(math.prod, layer_tensors(setup.architecture).values())) * setup.dtype.itemsize
        kept.append((f"{key}: host", "layers", layers * layer // setup.groups.tensor.size(), "disk"))
    if optimizer is not None:
        kept.append(("optimizer.implementation: deepspeed_cpu", "optimizer", optimizer, "auto"))
    if not kept:
        return
    settings, names, sizes, others = zip(*kept, strict=True)
    gathered = setup.groups.gather((platform.host_name(), sum(sizes), platform.free_host_memory()))
    processes = Counter(host for host, _, _ in gathered)
    for host, count in processes.items():
        wanted = sum(nbytes for each, nbytes, _ in gathered if each == host)
        free = min(nbytes for each, _, nbytes in gathered if each == host)
        if wanted > free:
            error = ConfigError(
                f"{' and '.join(settings)} need{'s' if len(kept) == 1 else ''} {wanted / 1e9:.1f} GB of {host}'s "
                f"memory for the {' and the '.join(names)} of {count} process{'es' if count > 1 else ''}, and "
                f"{free / 1e9:.1f} GB are free; use {' or '.join(others)}"
            )
            error.common = True
            raise error


def stream_from_files(slots: LayerSlots, read: Read) -> None:
    """Let the slots be filled from files."""
    staging = platform.Staging(slots.slots[0].memory, "model.residency to device")

    def fill(number: int, slot: Slot, event: Event) -> None:
        room = staging.room(slot.memory)
        with event("read", number):
            read(number, slot.views(room))
        if staging.copies:
            with event("copy", number):
                staging.send(slot.memory)

    slots.fill, slots.side = fill, platform.SideStream()


def stream_from_host(slots: LayerSlots, read: Read, advance: Callable[[int], None] | None = None) -> None:
    """Read all layers into page-locked host memory, and let the slots be filled from there.

    ``advance``: called with the number of bytes just read.
    """
    like = slots.slots[0]
    kept: dict[int, Tensor] = {}
    for number in slots.numbers:
        kept[number] = platform.host_buffer(like.memory.nbytes, "model.residency to disk")
        read(number, like.views(kept[number].view(like.memory.dtype)))
        if advance is not None:
            advance(like.memory.nbytes)

    def fill(number: int, slot: Slot, event: Event) -> None:
        with event("copy", number):
            slot.memory.copy_(kept[number].view(slot.memory.dtype), non_blocking=True)

    slots.fill, slots.side = fill, platform.SideStream()
