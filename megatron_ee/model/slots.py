"""Layers that share memory: the weights of a few layers are in memory at a time, each filled when its layer is reached.

All layers of a backbone have parameters of the same shapes; only their options (window, rotary embedding) differ. So a
few *slots* hold the weights of any of them. The traversal (``model.traversal``) asks for layers in order. A layer that
is reached gets a slot, which is filled unless it holds the layer's weights already. With a side stream the next layer's
slot is filled while this layer computes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ee import platform

Event = Callable[[str, int], contextlib.AbstractContextManager[None]]
"""``LayerSlots.event``."""
Fill = Callable[[int, "Slot", Event], None]
"""Writes the weights of a layer, given its number, into a slot. It must not refer to the slots' owner, which would then
not be freed as soon as it is unused."""
Record = Callable[[str, int, Any, Any], None]
"""Called with a kind of event, the layer, and ``platform.mark`` at its start and end.

Kinds: ``layer`` (its work), ``wait`` (until its slot is filled), and on the side stream ``read`` and ``copy``.
"""
ALIGNMENT = 256
"""Bytes. Each tensor starts at a multiple, as in memory of its own, so that the same kernels are chosen."""


@dataclass(eq=False)
class Slot:
    """Memory for the weights of one layer.

    Attributes:
        memory: ``[elements]``, of all tensors together.
        tensors: views of it, by the layer's parameter names.
        number: the layer whose weights it holds or is being filled with; None if its values are undefined.
        filling: the work that fills it; None if this was waited for.
    """

    memory: Tensor
    tensors: dict[str, nn.Parameter]
    number: int | None = None
    filling: platform.SideWork | None = None

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Views of other memory like ``memory``, by the layer's parameter names."""
        return {
            name: memory[each.storage_offset() :][: each.numel()].view(each.shape)
            for name, each in self.tensors.items()
        }


class LayerSlots:
    """The slots of a backbone's layers.

    Attributes:
        numbers: of the layers, without gaps.
        slots: the one that was used last comes last.
        fill: called to fill a slot; set when the model is loaded.
        side: fills slots ahead; None to fill each when its layer is reached.
        record: called for each event of the slots, on any thread; None to record nothing.
    """

    def __init__(self, layers: Mapping[int, nn.Module], count: int) -> None:
        """Allocate slots on the current default device.

        Args:
            layers: by number, without gaps, on the meta device; at least one.
            count: number of slots.
        """
        self.numbers = range(min(layers), max(layers) + 1)
        self.slots = [_allocate(layers[self.numbers[0]]) for _ in range(min(count, len(layers)))]
        self.fill: Fill | None = None
        self.side: platform.SideStream | None = None
        self.record: Record | None = None
        self._parameters = {number: dict(_places(layer)) for number, layer in layers.items()}
        for number in layers:
            self._bind(number, self.slots[0])

    def hold(self, number: int) -> None:
        """Give layer ``number`` its weights, and start to fill a slot with the next layer's.

        Raises:
            CheckpointError: a file cannot be read.
        """
        slot = self._start(number)
        if slot.filling is not None:
            filling, slot.filling, slot.number = slot.filling, None, None
            with self.event("wait", number):
                filling.wait()
            slot.number = number
        self._bind(number, slot)
        self.slots.remove(slot)
        self.slots.append(slot)
        if self.side is not None and len(self.slots) > 1:
            # After the last layer comes the first one: of the next step, or of the next token.
            self._start(number + 1 if number + 1 in self.numbers else self.numbers[0])

    @contextlib.contextmanager
    def event(self, kind: str, number: int) -> Iterator[None]:
        """Record what happens while the context is open."""
        record = self.record
        if record is None:
            yield
            return
        start = platform.mark()
        yield
        record(kind, number, start, platform.mark())

    def _start(self, number: int) -> Slot:
        """The slot with the weights of a layer. If there is none, the slot that was used longest ago is filled, by the
        side stream if there is one."""
        for slot in self.slots:
            if slot.number == number:
                return slot
        assert self.fill is not None, "the model is not loaded"
        slot = self.slots[0]
        slot.number = None  # a fill that raises leaves undefined values
        if self.side is None:
            self.fill(number, slot, self.event)
        else:
            slot.filling = self.side.start(partial(self.fill, number, slot, self.event), slot.memory)
        slot.number = number
        return slot

    def _bind(self, number: int, slot: Slot) -> None:
        """Make the tensors of a slot the parameters of a layer."""
        for name, (parameters, leaf) in self._parameters[number].items():
            parameters[leaf] = slot.tensors[name]


def _allocate(layer: nn.Module) -> Slot:
    """A slot for layers like ``layer``."""
    parameters = dict(layer.named_parameters())
    (dtype,) = {parameter.dtype for parameter in parameters.values()}
    unit = ALIGNMENT // dtype.itemsize
    starts, size = {}, 0
    for name, parameter in parameters.items():
        starts[name] = size
        size += math.ceil(parameter.numel() / unit) * unit
    memory = torch.empty(size, dtype=dtype)
    views = {
        name: memory[starts[name] : starts[name] + each.numel()].view(each.shape) for name, each in parameters.items()
    }
    return Slot(memory, {name: nn.Parameter(view, requires_grad=False) for name, view in views.items()})


def _places(layer: nn.Module) -> Iterator[tuple[str, tuple[dict[str, nn.Parameter | None], str]]]:
    """Where a layer's parameters are: by name, a submodule's parameters and the name among them."""
    for name, _ in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        yield name, (layer.get_submodule(owner)._parameters, leaf)
