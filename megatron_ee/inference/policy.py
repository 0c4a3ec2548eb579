"""Exit policies: which exits a token asks on its way, and whether it leaves there. Decisions alone, without a model.

A policy is a pydantic model. Its JSON form (``policy_from_json``, ``policy.model_dump(mode="json")``) holds its name
and fields. So it travels to other ranks and in requests, and nothing else needs to know its fields. ``exits_to_ask``
is called where the scheduler runs, ``leaves`` on the stage that has the exit.

To add a policy, write a subclass of ``ExitPolicy`` with a ``name`` and ``leaves``, and add it to ``POLICIES``::

    class Decreasing(ExitPolicy):
        name: Literal["decreasing"] = "decreasing"
        first: float

        def leaves(self, layer: int, confidence: float) -> bool:
            return confidence >= self.first / layer

To let it judge by something new, add a function of the logits to ``MEASURES`` and name it in ``measure``.
"""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator
from torch import Tensor

from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import ConfigError, shown

MAX_DEFERRED = 15
"""Default cap: with the new one 16 tokens run all layers together, which is what tiles take at a time. A cap of 8 made
text whose tokens all leave early up to a tenth slower (measured, AVX-512)."""
BACKOFF = 4
"""Default for tokens in a row that stay before their exit is asked less: asking costs a fifth of what leaving saves."""
DOUBLINGS = 4
"""Until an exit is asked about every sixteenth token."""
MOST_DEFERRED = 255
"""Cap for every policy, whatever it decides: more would make passes longer than memory is planned for."""


def _probability(logits: Tensor) -> Tensor:
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def _margin(logits: Tensor) -> Tensor:
    first, second = logits.softmax(-1).topk(2).values.unbind(-1)
    return first - second


def _entropy(logits: Tensor) -> Tensor:
    return 1 - torch.special.entr(logits.softmax(-1)).sum(-1) / math.log(logits.shape[-1])


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": _probability,
    "margin": _margin,
    "entropy": _entropy,
}
"""What confidence may be. Each takes logits ``[tokens, vocab]`` float32 and gives ``[tokens]`` float32: 1 where the
exit is certain, NaN where logits are not finite."""


@dataclass
class ExitHistory:
    """What became of a sequence's tokens at its exits so far. The scheduler keeps it; policies read it.

    Attributes:
        num_left: how many of the last tokens in a row left before the last layer.
        stays: by exit, how many tokens in a row asked it and stayed, and the index of the last of them.
    """

    num_left: int = 0
    stays: dict[int, tuple[int, int]] = field(default_factory=dict)

    def left(self, layer: int, *, early: bool) -> None:
        """A token left at an exit; one after the last layer leaves nothing to run later, so it is not ``early``."""
        self.stays.pop(layer, None)
        self.num_left = self.num_left + 1 if early else 0

    def stayed(self, layer: int, index: int) -> None:
        """The token of this index asked an exit and stayed. After preemption the same token may ask again."""
        count, last = self.stays.get(layer, (0, -1))
        self.stays[layer] = (count + (last != index), index)

    def ran_all_layers(self) -> None:
        """The final exit has emitted a token."""
        self.num_left = 0

    def backs_off(self, layer: int, index: int, backoff: int) -> bool:
        """Whether an exit is not asked about this token, since too many before it have stayed there."""
        count, last = self.stays.get(layer, (0, index))
        return last < index <= last + backoff_length(count, backoff)


class ExitPolicy(Strict):
    """Decides for each token of a sequence where it leaves the model.

    Whatever a policy decides depends on the sequence alone, so that an output does not depend on its neighbours.

    Attributes:
        name: of the policy, a key of ``POLICIES``.
        measure: what confidence is, a key of ``MEASURES``.
        max_deferred: after so many tokens in a row that left early, the next runs all layers, and the final exit
            emits it.
        min_full: so many tokens at the start run all layers.
        backoff: after so many tokens in a row that stayed, an exit is asked about every second one only, then about
            every fourth, eighth and sixteenth, until one leaves there: its head costs as much as layers do. 0 asks
            always.
    """

    name: str
    measure: str = "probability"
    max_deferred: int = Field(default=MAX_DEFERRED, ge=0, le=MOST_DEFERRED)
    min_full: int = Field(default=1, ge=1)
    backoff: int = Field(default=BACKOFF, ge=0)

    @field_validator("measure")
    @classmethod
    def _known_measure(cls, value: str) -> str:
        if value not in MEASURES:
            raise ValueError(f"must be one of {', '.join(MEASURES)}, not {shown(value)}")
        return value

    def exits_to_ask(self, exits: tuple[int, ...], index: int, history: ExitHistory) -> tuple[int, ...]:
        """Layers of the exits that the next token asks; it leaves at the first that lets it.

        Args:
            exits: that the sequence may ask.
            index: of the token among those that are emitted, from 0.
            history: of the tokens before it.
        """
        if index < self.min_full or history.num_left >= self.max_deferred:
            return ()
        return tuple(layer for layer in exits if not history.backs_off(layer, index, self.backoff))

    @abstractmethod
    def leaves(self, layer: int, confidence: float) -> bool:
        """Whether the token leaves at the exit after ``layer``, whose head is so confident (a float32 value)."""

    def named_exits(self) -> Collection[int]:
        """Layers of the exits that the settings name: a request is refused where the model does not have one."""
        return ()


Confidence = Annotated[float, Field(gt=0)]


class ThresholdPolicy(ExitPolicy):
    """A token leaves at the first exit that is confident enough.

    Attributes:
        threshold: least confidence; above 1 none leaves.
        thresholds: by layer, where an exit has its own.
    """

    name: Literal["threshold"] = "threshold"
    threshold: Confidence = 0.9
    thresholds: Mapping[int, Confidence] = Field(default_factory=dict)

    @field_validator("thresholds", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        """JSON has text for keys."""
        if not isinstance(value, Mapping):
            return value
        digits = (isinstance(layer, str) and layer.isascii() and layer.isdigit() for layer in value)
        return {int(k) if is_text else k: v for (k, v), is_text in zip(value.items(), digits, strict=True)}

    def leaves(self, layer: int, confidence: float) -> bool:
        """See ``ExitPolicy``."""
        return confidence >= _float32(self.thresholds.get(layer, self.threshold))

    def named_exits(self) -> Collection[int]:
        """See ``ExitPolicy``."""
        return self.thresholds.keys()


POLICIES: dict[str, type[ExitPolicy]] = {
    "threshold": ThresholdPolicy,
}


def policy_from_json(form: Any) -> ExitPolicy:
    """A policy from its JSON form.

    Raises:
        ConfigError: naming the key: there is no such policy, or a field is impossible.
    """
    if not isinstance(form, Mapping):
        raise ConfigError(f"must be an object with the name of a policy, not {shown(form)}")
    name = form.get("name", "threshold")
    if not isinstance(name, str) or name not in POLICIES:
        raise ConfigError(f"name: must be one of {', '.join(POLICIES)}, not {shown(name)}")
    return validated(POLICIES[name], dict(form))


def _read(value: Any) -> Any:
    return value if isinstance(value, ExitPolicy) else policy_from_json(value)


AnyPolicy = Annotated[SerializeAsAny[ExitPolicy], BeforeValidator(_read)]
"""Type of a field that holds any policy, and reads and writes its JSON form."""


def backoff_length(failures: int, backoff: int = BACKOFF) -> int:
    """How often to skip what has failed so many times in a row: 1, 3, 7 and then 15 times from ``backoff`` on.

    A ``backoff`` of 0 never skips.
    """
    return 0 if backoff == 0 or failures < backoff else (1 << min(failures - backoff + 1, DOUBLINGS)) - 1


def _float32(value: float) -> float:
    """``value`` as float32 holds it: thresholds are compared with confidences as tensors would be."""
    return float(struct.unpack("f", struct.pack("f", min(value, 3e38)))[0])
