"""Gradients that go to host memory as each exit is complete, where the optimizer is there too (``host_adam``).

Before an exit's first backward of a step its gradient buffers are allocated. When its gradients are complete, they are
copied, and the buffers are freed. So the device holds the gradients of one exit at a time, if exits are trained one
after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron_ee import platform
from megatron_ee.parallel.host_adam import HostAdam


@dataclass(frozen=True)
class Shard:
    """The range of a trained parameter that this data-parallel rank updates.

    Attributes:
        parameter: the model's own.
        start: first element of the flattened parameter.
        stop: end of the range.
        weights: what the optimizer updates.
    """

    parameter: nn.Parameter
    start: int
    stop: int
    weights: Tensor


class HostGradients:
    """The gradients of one exit, in megatron-core's buffers while they are summed and in host memory afterwards.

    Attributes:
        queue: does the copies.
        allocated: whether the buffers have memory.
    """

    def __init__(self, wrapper: Any, shards: Iterable[Shard], adam: HostAdam) -> None:
        """Free the buffers.

        Args:
            wrapper: megatron-core's data-parallel wrapper of the exit, which has the buffers.
            shards: what this rank updates of the exit's parameters.
            adam: updates them.
        """
        self._shards, self._adam, self.queue = tuple(shards), adam, adam.queue
        self._buffers = [(buffer.grad_data, buffer.grad_data.nbytes) for buffer in wrapper.buffers]
        for buffer in wrapper.buffers:
            buffer.reset = lambda: None  # ``begin`` zeroes it
        self.allocated = True
        self._free()

    def begin(self) -> None:
        """Allocate the buffers and zero them, unless they are allocated."""
        if not self.allocated:
            for gradients, nbytes in self._buffers:
                gradients.untyped_storage().resize_(nbytes)
                platform.zero_(gradients)
        self.allocated = True

    def finish(self) -> None:
        """Start to copy the gradients to host memory, and free the buffers."""
        for shard in self._shards:
            gradient: Tensor = shard.parameter.main_grad  # type: ignore[attr-defined]
            self._adam.receive(shard.weights, gradient.view(-1)[shard.start : shard.stop])
        self._free()

    def of(self, parameter: nn.Parameter) -> Tensor:
        """The host copy of this rank's range of a parameter's gradient, float32 ``[elements]``, after ``finish``."""
        self.queue.finish()
        (shard,) = (shard for shard in self._shards if shard.parameter is parameter)
        return self._adam.gradient(shard.weights)

    def _free(self) -> None:
        for gradients, _ in self._buffers:
            self.queue.reads(gradients)
            gradients.untyped_storage().resize_(0)
        self.allocated = False
