"""Whether a token leaves at an exit: decisions alone, without model or state."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_ee.errors import ConfigError, shown

Measure = Literal["probability", "margin", "entropy"]

MAX_DEFERRED = 15
"""Default cap: with the new one 16 tokens run all layers together, which is what tiles take at a time. A cap of 8 made
text whose tokens all leave early up to a tenth slower (measured, AVX-512)."""
PATIENCE = 4
"""Default for tokens in a row that stay before their exit is asked less: asking costs a fifth of what leaving saves."""
DOUBLINGS = 4
"""Until an exit is asked about every sixteenth token."""

MOST_DEFERRED = 255
"""More would make passes longer than memory is planned for."""


@dataclass(frozen=True)
class ExitPolicy:
    """A token leaves at the first exit that is confident enough.

    Attributes:
        threshold: least confidence; above 1 none leaves.
        thresholds: by layer, where an exit has its own.
        measure: what confidence is: the maximum ``probability`` over the whole vocabulary, its ``margin`` over the
            second, or 1 - ``entropy`` / log(vocabulary); each is 1 where the exit is certain.
        max_deferred: after so many tokens in a row that left early, the next runs all layers, and the final exit
            emits it. It depends on the row alone, so that its output does not depend on its neighbours.
        min_full: so many tokens at the start run all layers.
        patience: after so many tokens in a row that stayed, an exit is asked about every second one only, then about
            every fourth, eighth and sixteenth, until one leaves there: its head costs as much as layers do. 0 asks
            always. It depends on the row alone too.
    """

    threshold: float = 0.9
    thresholds: Mapping[int, float] = field(default_factory=dict)
    measure: Measure = "probability"
    max_deferred: int = MAX_DEFERRED
    min_full: int = 1
    patience: int = PATIENCE

    def check(self) -> None:
        """Raise a ``ConfigError`` that names the field where a value is impossible."""
        if not isinstance(self.thresholds, Mapping):
            raise ConfigError(f"thresholds: must give thresholds by layer, not {shown(self.thresholds)}")
        named: list[tuple[str, float]] = [("threshold:", self.threshold)]
        named += [
            (f"thresholds: that of the exit after layer {layer}", value) for layer, value in self.thresholds.items()
        ]
        for name, value in named:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= sys.float_info.max:
                raise ConfigError(f"{name} must be a number above 0, not {shown(value)}; above 1 no token leaves early")
        if self.measure not in get_args(Measure):
            raise ConfigError(f"measure: {self.measure!r} is unknown; possible: {', '.join(get_args(Measure))}")
        if type(self.max_deferred) is not int or not 0 <= self.max_deferred <= MOST_DEFERRED:
            raise ConfigError(
                f"max_deferred: must be a whole number from 0 to {MOST_DEFERRED}, not {shown(self.max_deferred)}"
            )
        if type(self.patience) is not int or self.patience < 0:
            raise ConfigError(
                f"patience: must be a whole number, 0 or more, not {shown(self.patience)}; 0 asks exits always"
            )
        if type(self.min_full) is not int or self.min_full < 1:
            raise ConfigError(
                f"min_full: must be a whole number, 1 or more, not {shown(self.min_full)}: a prompt never leaves early"
            )

    def may_leave(self, emitted: int, since_full: int) -> bool:
        """Whether the next token may leave early.

        Args:
            emitted: tokens of the row so far.
            since_full: how many of the last ones left early.
        """
        return emitted >= self.min_full and since_full < self.max_deferred

    def rest(self, stayed: int) -> int:
        """Tokens that an exit is not asked about, once so many in a row have stayed."""
        return rest(stayed, self.patience)

    def at(self, layer: int) -> float:
        """Least confidence at the exit after ``layer``."""
        return self.thresholds.get(layer, self.threshold)


def rest(vain: int, patience: int = PATIENCE) -> int:
    """How many times not to try what has been in vain so many times in a row: 1, 3, 7 and then 15 beyond patience.

    A patience of 0 has no end.
    """
    return 0 if patience == 0 or vain < patience else (1 << min(vain - patience + 1, DOUBLINGS)) - 1


def confidences(logits: Tensor, measure: Measure) -> Tensor:
    """Confidence ``[tokens]`` of logits ``[tokens, vocab]``, float32; NaN where they are not finite."""
    if measure == "probability":
        return (logits.amax(-1) - logits.logsumexp(-1)).exp()
    probabilities = logits.softmax(-1)
    if measure == "margin":
        first, second = probabilities.topk(2).values.unbind(-1)
        return first - second
    return 1 - torch.special.entr(probabilities).sum(-1) / math.log(logits.shape[-1])
