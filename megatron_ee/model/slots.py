"""Layers that share memory: the weights of a few layers are in memory at a time, each filled when its layer is reached.

All layers of a backbone have parameters of the same shapes; only their options (window, rotary embedding) differ. So
``count`` *slots* hold the weights of ``count`` layers, and layer n is bound to slot ``n % count``. The traversal
(``model.traversal``) asks for layers in order, and a slot is filled when it holds another layer's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Fill = Callable[[int, "Slot"], None]
"""Writes the weights of a layer, given its number, into a slot."""
ALIGNMENT = 256
"""Bytes. Each tensor starts at a multiple, as in memory of its own, so that the same kernels are chosen."""


@dataclass
class Slot:
    """Memory for the weights of one layer.

    Attributes:
        memory: ``[elements]``, of all tensors together.
        tensors: views of it, by the layer's parameter names.
        number: the layer whose weights it holds; None if its values are undefined.
    """

    memory: Tensor
    tensors: dict[str, nn.Parameter]
    number: int | None = None


class LayerSlots:
    """The slots of a backbone's layers.

    Attributes:
        slots: layer n uses slot ``n % len(slots)``.
        fill: called to fill a slot; set when the model is loaded.
    """

    def __init__(self, layers: Mapping[int, nn.Module], count: int) -> None:
        """Allocate slots on the current default device, and bind layers to them.

        Args:
            layers: by number, without gaps, on the meta device; at least one.
            count: number of slots.
        """
        first = next(iter(layers.values()))
        self.slots = [_allocate(first) for _ in range(min(count, len(layers)))]
        self.fill: Fill | None = None
        for number, layer in layers.items():
            _bind(layer, self._slot(number))

    def hold(self, number: int) -> None:
        """Fill the slot of layer ``number``, unless it holds this layer's weights already."""
        slot = self._slot(number)
        if slot.number == number:
            return
        assert self.fill is not None, "the model is not loaded"
        slot.number = None  # a fill that raises leaves undefined values
        self.fill(number, slot)
        slot.number = number

    def _slot(self, number: int) -> Slot:
        return self.slots[number % len(self.slots)]


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


def _bind(layer: nn.Module, slot: Slot) -> None:
    """Make the tensors of a slot the parameters of a layer."""
    for name, parameter in list(layer.named_parameters()):
        held = slot.tensors[name]
        assert (held.shape, held.dtype) == (parameter.shape, parameter.dtype), "layers have equal parameters"
        held.__dict__.update(parameter.__dict__)  # megatron-core's marks
        owner, _, leaf = name.rpartition(".")
        layer.get_submodule(owner).register_parameter(leaf, held)
