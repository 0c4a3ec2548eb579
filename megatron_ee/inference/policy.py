"""Which exit emits a token: decisions alone, without model or state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MAX_DEFERRED = 8
"""Default cap: a full pass over 8 deferred tokens and a new one costs little more than over one (bf16), and the wait
for it, the only long one, comes at most every ninth token."""


@dataclass(frozen=True)
class ExitPolicy:
    """A token leaves at the first exit that is confident enough.

    Attributes:
        threshold: least confidence, the maximum softmax probability over the whole vocabulary; above 1 none leaves.
        max_deferred: deferred tokens at which the next token must run all layers, and they with it.
    """

    threshold: float
    max_deferred: int = MAX_DEFERRED

    def may_leave(self, deferred: int) -> bool:
        """Whether the next token may leave early while ``deferred`` tokens wait for their deeper layers."""
        return deferred < self.max_deferred

    def leaves(self, confidence: Tensor) -> bool:
        """Whether a token leaves at an exit of this confidence, a scalar; compared in its own dtype, as metrics do."""
        return bool(confidence >= self.threshold)
