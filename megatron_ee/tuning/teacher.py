"""Teacher messages: what goes back for each microbatch from the stage of the last layer to the stages with exits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.schema import DistillationConfig
from megatron_ee.data.loader import Batch
from megatron_ee.model.distillation import Teacher
from megatron_ee.model.setup import ModelSetup


class TeacherMessage(Protocol):
    """A kind of teacher, and how it travels: as one flat tensor of ``dtype``."""

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the messages."""

    def size(self, batch: Batch) -> int:
        """Number of elements of a microbatch's message."""

    def pack(self, teacher: Any) -> Sequence[Tensor]:
        """The parts of the message."""

    def unpack(self, message: Tensor, batch: Batch) -> Any:
        """The teacher; it may be a view of ``message``, which the next but one overwrites."""

    def stand_in(self, batch: Batch) -> Any:
        """A valid teacher for a microbatch without a message, whose tokens are all masked."""


class TopTokens:
    """The final exit's ``k`` most probable tokens: a ``Teacher``."""

    dtype = torch.int32

    def __init__(self, k: int) -> None:
        self.k = k

    def size(self, batch: Batch) -> int:
        """See ``TeacherMessage``."""
        return 2 * batch.tokens.numel() * self.k

    def pack(self, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """Token ids, then the bits of the log-probabilities."""
        return teacher.ids.int(), teacher.log_probabilities.contiguous().view(torch.int32)

    def unpack(self, message: Tensor, batch: Batch) -> Teacher:
        """See ``TeacherMessage``."""
        ids, bits = message.view(2, batch.tokens.numel(), self.k).unbind()
        return Teacher(ids.long(), bits.view(torch.float32))

    def stand_in(self, batch: Batch) -> Teacher:
        """See ``TeacherMessage``."""
        ids = torch.arange(self.k, device=platform.device()).expand(batch.tokens.numel(), -1)
        return Teacher(ids, torch.full(ids.shape, -math.log(self.k), device=platform.device()))


class LastHidden:
    """The hidden state after the last layer, before the final norm: ``[seq, batch, hidden]``, or a share of seq."""

    def __init__(self, setup: ModelSetup) -> None:
        self._setup, self.dtype = setup, setup.dtype

    def size(self, batch: Batch) -> int:
        """See ``TeacherMessage``."""
        return self._setup.hidden_shape(*batch.tokens.shape).numel()

    def pack(self, teacher: Tensor) -> tuple[Tensor]:
        """See ``TeacherMessage``."""
        return (teacher,)

    def unpack(self, message: Tensor, batch: Batch) -> Tensor:
        """See ``TeacherMessage``."""
        return message.view(self._setup.hidden_shape(*batch.tokens.shape))

    def stand_in(self, batch: Batch) -> Tensor:
        """See ``TeacherMessage``."""
        shape = self._setup.hidden_shape(*batch.tokens.shape)
        return torch.zeros(shape, dtype=self.dtype, device=platform.device())


def of_distillation(settings: DistillationConfig) -> TopTokens | None:
    """The messages of a run: the teacher's most probable tokens, or none without distillation."""
    return TopTokens(settings.top_k) if settings.kl > 0 else None
