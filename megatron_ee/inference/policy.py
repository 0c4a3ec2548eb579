"""Exit policies decide which exits a token asks, and whether it leaves there. They do not need the model.

A policy is a pydantic model. Its JSON form (``policy_from_json``, ``policy.model_dump(mode="json")``) holds its name
and fields. So it can be sent to other ranks and in requests without code for each policy. ``exits_to_ask`` is called
on the rank of the scheduler, ``leaves`` on the stage that has the exit.

To add a policy, write a subclass of ``ExitPolicy`` with a ``name`` and ``leaves``, and add it to ``POLICIES``::

    class Decreasing(ExitPolicy):
        name: Literal["decreasing"] = "decreasing"
        first: float

        def leaves(self, layer: int, confidence: float) -> bool:
            return confidence >= self.first / layer

To add a confidence measure, add a function of the logits to ``MEASURES`` and set ``measure`` to its name.
"""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator
from torch import Tensor

from megatron_ee.config.validation import NestedError, Strict, nested, one_of, validated
from megatron_ee.errors import shown

MAX_DEFERRED = 15
"""Default of ``ExitPolicy.max_deferred``. With the new token, 16 tokens then run all layers together, a full matrix
tile. A limit of 8 was up to 10% slower on text whose tokens all leave early (measured, AVX-512)."""
BACKOFF = 4
"""Default of ``ExitPolicy.backoff``. Asking an exit costs about a fifth of what leaving there saves."""
DOUBLINGS = 4
"""Doublings of the back-off interval: an exit is asked about every sixteenth token at least."""
MOST_DEFERRED = 255
"""Maximum deferred tokens in a row, for every policy. Memory is planned for passes of at most this length."""


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
"""Confidence measures: logits ``[tokens, vocab]`` float32 -> confidence ``[tokens]`` float32. It is 1 if the exit is
certain, and NaN if the logits are not finite."""
Measure = Annotated[str, one_of(MEASURES)]
"""Type of a pydantic field that names a confidence measure."""


@dataclass
class ExitHistory:
    """A sequence's exit decisions so far. The scheduler updates it; policies read it.

    Attributes:
        num_left: number of consecutive tokens, up to the last one, that left before the last layer.
        stays: by layer of the exit, the number of consecutive tokens that asked it and did not leave, and the index of
            the last of them.
    """

    num_left: int = 0
    stays: dict[int, tuple[int, int]] = field(default_factory=dict)

    def left(self, layer: int, *, early: bool) -> None:
        """Record that a token left at an exit. ``early`` is False after the last layer, where no layers are skipped."""
        self.stays.pop(layer, None)
        self.num_left = self.num_left + 1 if early else 0

    def stayed(self, layer: int, index: int) -> None:
        """Record that token ``index`` asked an exit and did not leave. After preemption it may ask again."""
        count, last = self.stays.get(layer, (0, -1))
        self.stays[layer] = (count + (last != index), index)

    def ran_all_layers(self) -> None:
        """Record that the final exit emitted a token."""
        self.num_left = 0

    def backs_off(self, layer: int, index: int, backoff: int) -> bool:
        """Whether token ``index`` skips an exit because too many tokens before it did not leave there."""
        count, last = self.stays.get(layer, (0, index))
        return last < index <= last + backoff_length(count, backoff)


class ExitPolicy(Strict):
    """Decides at which exit each token of a sequence leaves the model.

    A decision depends only on the sequence itself, so an output does not depend on the other sequences in the batch.

    Attributes:
        name: key of ``POLICIES``.
        measure: confidence measure, a key of ``MEASURES``.
        max_deferred: maximum number of consecutive tokens that leave early. The next token runs all layers and is
            emitted by the final exit.
        min_full: number of tokens at the start of the output that run all layers.
        backoff: number of consecutive tokens that do not leave at an exit before it backs off: it is then asked about
            every second token, then every fourth, eighth and sixteenth, until a token leaves there. This saves the
            cost of its head. 0 disables back-off.
        gated: whether ``leaves`` is asked before the head runs, with the probability of the exit's gate as confidence.
    """

    gated: ClassVar[bool] = False
    name: str
    measure: Measure = "probability"
    max_deferred: int = Field(default=MAX_DEFERRED, ge=0, le=MOST_DEFERRED)
    min_full: int = Field(default=1, ge=1)
    backoff: int = Field(default=BACKOFF, ge=0)

    def exits_to_ask(self, exits: tuple[int, ...], index: int, history: ExitHistory) -> tuple[int, ...]:
        """Layers of the exits that the next token asks. It leaves at the first one for which ``leaves`` is true.

        Args:
            exits: layers of the exits that the request allows.
            index: index of the token in the output, from 0.
            history: of the tokens before it.
        """
        if index < self.min_full or history.num_left >= self.max_deferred:
            return ()
        return tuple(layer for layer in exits if not history.backs_off(layer, index, self.backoff))

    @abstractmethod
    def leaves(self, layer: int, confidence: float) -> bool:
        """Whether the token leaves at the exit after ``layer``; ``confidence`` is a float32 value."""

    def named_exits(self) -> Mapping[str, Collection[int]]:
        """By field, the layers of the exits that it names. A request that names an exit the model lacks is an error."""
        return {}

    def threshold_at(self, layer: int) -> float | None:
        """The confidence at which a token leaves at the exit after ``layer``; None if there is no such number."""
        return None


Confidence = Annotated[float, Field(gt=0)]


class _Thresholds(ExitPolicy):
    """A token leaves at the first exit whose confidence is at least the threshold.

    Attributes:
        threshold: the threshold; above 1, no token leaves.
        thresholds: by layer, thresholds of single exits; they replace ``threshold`` there.
    """

    threshold: Confidence = 0.9
    thresholds: Mapping[int, Confidence] = Field(default_factory=dict)

    @field_validator("thresholds", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        """Convert JSON's string keys to integers."""
        if not isinstance(value, Mapping):
            return value
        layers = [int(k) if isinstance(k, str) and k.isascii() and k.isdigit() else k for k in value]
        found = dict(zip(layers, value.values(), strict=True))
        if len(found) != len(value):  # "8" and "08" of a file
            raise ValueError(f"names a layer twice: {shown(list(value))}")
        return found

    def leaves(self, layer: int, confidence: float) -> bool:
        """See ``ExitPolicy``."""
        return confidence >= _float32(self.threshold_at(layer))

    def threshold_at(self, layer: int) -> float:
        """See ``ExitPolicy``."""
        return self.thresholds.get(layer, self.threshold)

    def named_exits(self) -> Mapping[str, Collection[int]]:
        """See ``ExitPolicy``."""
        return {"thresholds": self.thresholds.keys()}


class ThresholdPolicy(_Thresholds):
    """The confidence is computed from the head's logits, see ``measure``."""

    name: Literal["threshold"] = "threshold"


class GatePolicy(_Thresholds):
    """The confidence is the probability that the exit agrees with the final exit, predicted by the exit's gate.

    The head runs only for tokens that leave. ``measure`` is the confidence of the tokens that the final exit emits. An
    exit where no token leaves costs little, so there is no back-off by default.
    """

    gated: ClassVar[bool] = True
    name: Literal["gate"] = "gate"
    backoff: int = Field(default=0, ge=0)


POLICIES: dict[str, type[ExitPolicy]] = {
    "threshold": ThresholdPolicy,
    "gate": GatePolicy,
}


def _read(value: Any) -> Any:
    """A policy, from its JSON form if it is not one already."""
    if isinstance(value, ExitPolicy):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"must be an object with the name of a policy, not {shown(value)}")
    name = value.get("name", "threshold")
    if not isinstance(name, str) or name not in POLICIES:
        raise NestedError("name", f"must be one of {', '.join(POLICIES)}, not {shown(name)}")
    return nested(POLICIES[name], dict(value))


AnyPolicy = Annotated[SerializeAsAny[ExitPolicy], BeforeValidator(_read)]
"""Type of a pydantic field that holds any policy and validates and serialises its JSON form."""


def policy_from_json(form: Any) -> ExitPolicy:
    """A policy from its JSON form.

    Raises:
        ConfigError: the name is unknown or a field is invalid; the message names the key.
    """
    policy: ExitPolicy = validated(AnyPolicy, form)  # type: ignore[type-abstract]
    return policy


def backoff_length(failures: int, backoff: int = BACKOFF) -> int:
    """Number of tries to skip after ``failures`` consecutive failures.

    0 below ``backoff`` failures, then 1, 3, 7, and 15 from there on. Always 0 if ``backoff`` is 0.
    """
    return 0 if backoff == 0 or failures < backoff else (1 << min(failures - backoff + 1, DOUBLINGS)) - 1


def _float32(value: float) -> float:
    """Round ``value`` to float32, because confidences are float32 values."""
    return float(struct.unpack("f", struct.pack("f", min(value, 3e38)))[0])
