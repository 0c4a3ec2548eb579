"""What is known of the exits over many tokens, as plain numbers: loss, agreement, calibration, and each threshold."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ReliabilityBin:
    """Tokens whose confidence lies in (lower, upper]; the means over them are nan where there are none."""

    lower: float
    upper: float
    tokens: int
    confidence: float
    accuracy: float
    agreement: float


@dataclass(frozen=True)
class ExitQuality:
    """One exit over all tokens, were it the only one.

    Attributes:
        layer: the layer it stands after.
        loss: mean next-token loss in nats.
        accuracy: share of tokens where its top-1 is the label.
        agreement: share of tokens where its top-1 is the final exit's.
        mean_confidence: mean maximum probability.
        ece: expected calibration error: |confidence - accuracy| over the bins, weighted by their tokens
            (Guo et al. 2017, arXiv 1706.04599).
        ece_agreement: the same against agreement, which is what an early exit's confidence stands in for.
        bins: the reliability diagram, in equal steps of confidence.
    """

    layer: int
    loss: float
    accuracy: float
    agreement: float
    mean_confidence: float
    ece: float
    ece_agreement: float
    bins: tuple[ReliabilityBin, ...]

    @property
    def perplexity(self) -> float:
        """exp of the loss; inf where that is too large for a float."""
        return perplexity(self.loss)


@dataclass(frozen=True)
class AboveThreshold:
    """Tokens of which one exit is confident enough, earlier exits aside; means are nan where there are none."""

    layer: int
    share: float
    agreement: float
    accuracy: float


@dataclass(frozen=True)
class SweepPoint:
    """What happens at one threshold: each token leaves at the first exit that is at least so confident.

    Attributes:
        threshold: the confidence asked for.
        shares: share of tokens leaving at each exit, and last at the final exit; they sum to 1.
        mean_layers: layers run per token (see ``QualityAccumulator``), deferred work not counted.
        agreement: share of tokens where what is emitted is the final exit's top-1.
        accuracy: share of tokens where what is emitted is the label.
        above: per exit, the tokens it would let leave on its own.
    """

    threshold: float
    shares: tuple[float, ...]
    mean_layers: float
    agreement: float
    accuracy: float
    above: tuple[AboveThreshold, ...]


@dataclass(frozen=True)
class Quality:
    """Quality of all exits on one set of tokens; ``num_layers`` is the backbone's depth."""

    tokens: int
    num_layers: int
    final_loss: float
    final_accuracy: float
    exits: tuple[ExitQuality, ...]
    sweep: tuple[SweepPoint, ...]

    @property
    def final_perplexity(self) -> float:
        """exp of the final exit's loss."""
        return perplexity(self.final_loss)

    def to_dict(self) -> dict[str, Any]:
        """As strict JSON takes it: perplexities added, numbers that are not finite as None."""
        data = asdict(self) | {"final_perplexity": self.final_perplexity}
        for entry, exit_ in zip(data["exits"], self.exits, strict=True):
            entry["perplexity"] = exit_.perplexity
        return strict_json(data)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Quality:
        """The inverse of ``to_dict``; further keys are passed over, None becomes nan.

        Raises:
            KeyError: a key is missing.
        """
        exits = tuple(
            _read(ExitQuality, exit_, bins=tuple(_read(ReliabilityBin, bin_) for bin_ in exit_["bins"]))
            for exit_ in data["exits"]
        )
        sweep = tuple(
            _read(
                SweepPoint,
                point,
                shares=tuple(point["shares"]),
                above=tuple(_read(AboveThreshold, above) for above in point["above"]),
            )
            for point in data["sweep"]
        )
        return _read(cls, data, exits=exits, sweep=sweep)


def perplexity(loss: float) -> float:
    """exp(loss), or inf where that overflows."""
    return math.exp(loss) if not loss > 709 else math.inf


def strict_json(value: Any) -> Any:
    """Tuples as lists, and None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [strict_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(kind: Any, data: dict[str, Any], **given: Any) -> Any:
    """A dataclass of this kind from a dict: None as nan, further keys passed over."""
    plain = {field.name: data[field.name] for field in fields(kind) if field.name not in given}
    return kind(**given, **{name: math.nan if value is None else value for name, value in plain.items()})
