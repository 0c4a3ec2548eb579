"""Messages between stages: each microbatch's hidden states and taps forward, and teacher messages backward.

There is one message per pair of stages and microbatch, always in the order of the microbatches, so a pair of ranks
needs no tags. Receives are posted early, and a send is waited for only when its memory is needed again, so transfer
overlaps computation. Buffers are allocated once and reused. megatron-core's own transfer reaches only neighbours and
always waits.

A posted receive occupies the device until its message arrives. So a rank posts a receive only after it has sent
everything that this message depends on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee import platform


def connect(group: dist.ProcessGroup, source: int, target: int) -> None:
    """Exchange a first message between two ranks. Every rank calls this for all pairs in the same order.

    NCCL creates a pair's communicator at the first message; a rank that posts a receive then blocks until its peer
    sends. Receives are posted long before the sends, so without this call stages could deadlock.
    """
    token = torch.zeros(1, device=platform.device())
    if group.rank() == source:
        dist.send(token, group=group, group_dst=target)
    elif group.rank() == target:
        dist.recv(token, group=group, group_src=source)


class Inbox:
    """Messages from one rank, received ahead of their use."""

    def __init__(
        self, group: dist.ProcessGroup, source: int, dtype: torch.dtype, *, ahead: int = 1, held: int = 0
    ) -> None:
        """
        Args:
            group: the communicator.
            source: rank in it.
            dtype: of all messages.
            ahead: receives that may be posted besides the message that is taken, at least 1.
            held: messages that are still in use when a later one is taken.
        """
        self._group, self._source, self._dtype = group, source, dtype
        self._buffers: list[Tensor] = [_nothing(dtype)] * (ahead + held + 1)
        self._sizes: list[int] = []
        self._posted: list[dist.Work] = []
        self._taken = 0

    def begin(self, sizes: Sequence[int]) -> None:
        """Expect messages of these numbers of elements, in this order."""
        self._sizes, self._posted, self._taken = list(sizes), [], 0
        self._buffers = _room(self._buffers, max(sizes, default=0), self._dtype)

    def post(self, count: int) -> None:
        """Post receives for the first ``count`` messages, with at most ``ahead`` of them not taken yet."""
        for number in range(len(self._posted), min(count, len(self._sizes))):
            work = dist.irecv(self._buffer(number), group=self._group, group_src=self._source)
            assert work is not None
            self._posted.append(work)

    def take(self) -> Tensor:
        """Wait for the next message and return it, flat. Its receive must be posted.

        The tensor is overwritten ``held + 1`` takes later.
        """
        number = self._taken
        self._posted[number].wait()
        self._taken += 1
        return self._buffer(number)

    def _buffer(self, number: int) -> Tensor:
        return self._buffers[number % len(self._buffers)][: self._sizes[number]]


class Outbox:
    """Messages to one rank.

    Attributes:
        target: rank in the group.
        messages: number sent so far.
    """

    def __init__(self, group: dist.ProcessGroup, target: int, dtype: torch.dtype, *, ahead: int = 1) -> None:
        """``ahead``: sends that may be in progress when another is started."""
        self._group, self.target, self._dtype = group, target, dtype
        self._buffers: list[Tensor] = [_nothing(dtype)] * (ahead + 1)
        self._work: list[dist.Work | None] = [None] * (ahead + 1)
        self.messages = 0

    def send(self, parts: Sequence[Tensor]) -> None:
        """Start sending ``parts`` as one message. They are copied, so the caller may change them at once."""
        slot, size = self.messages % len(self._work), sum(part.numel() for part in parts)
        self._wait(slot)
        if len(self._buffers[slot]) < size:
            self._buffers[slot] = torch.empty(size, dtype=self._dtype, device=platform.device())
        message = self._buffers[slot][:size]
        torch.cat([part.detach().reshape(-1) for part in parts], out=message)
        self._work[slot] = dist.isend(message, group=self._group, group_dst=self.target)
        self.messages += 1

    def finish(self) -> None:
        """Wait until all messages are sent."""
        for slot in range(len(self._work)):
            self._wait(slot)

    def _wait(self, slot: int) -> None:
        work, self._work[slot] = self._work[slot], None
        if work is not None:
            work.wait()


def _nothing(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=platform.device())


def _room(buffers: list[Tensor], size: int, dtype: torch.dtype) -> list[Tensor]:
    """``buffers``, or larger ones if they are too small."""
    if len(buffers[0]) >= size:
        return buffers
    return [torch.empty(size, dtype=dtype, device=platform.device()) for _ in buffers]
