"""Quality of the exits over many tokens, as plain numbers: loss, agreement, calibration, and a threshold sweep."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ReliabilityBin:
    """Tokens with a confidence in (lower, upper]. The means are NaN if there are none."""

    lower: float
    upper: float
    tokens: int
    confidence: float
    accuracy: float
    agreement: float


@dataclass(frozen=True)
class DraftAcceptance:
    """Greedy speculative decoding with the drafts of one exit, summed over continuations of prompts.

    Attributes:
        draft_length: proposals per round.
        rounds: number of rounds.
        tokens: tokens that they emitted: accepted proposals, and one token of the full model per round.
        proposed: proposals, without those after the end of the text.
        accepted: proposals that were right, up to the first wrong one of each round.
    """

    draft_length: int
    rounds: int
    tokens: int
    proposed: int
    accepted: int

    @property
    def length(self) -> float:
        """Acceptance length: tokens per round, the full model's own included; nan without rounds."""
        return self.tokens / self.rounds if self.rounds else math.nan

    @property
    def rate(self) -> float:
        """Share of accepted proposals among ``proposed``; nan if there are none."""
        return self.accepted / self.proposed if self.proposed else math.nan


@dataclass(frozen=True)
class FreeRunning:
    """Greedy threshold mode, compared with the full model's continuations of the same prompts, place by place.

    Attributes:
        threshold: confidence at which a token leaves, at any exit.
        prompts: number of prompts.
        tokens: of the full model's continuations.
        equal: of these, the tokens that threshold mode emits at the same place.
        before: of these, the tokens before the first different one of each prompt.
        later: tokens that threshold mode emits after the first of each prompt.
        layer_runs: decoder layers that ran for these.
    """

    threshold: float
    prompts: int
    tokens: int
    equal: int
    before: int
    later: int
    layer_runs: int

    @property
    def agreement(self) -> float:
        """Share of equal tokens."""
        return self.equal / self.tokens

    @property
    def departure(self) -> float:
        """Mean number of tokens before the first different one, or before the end of the continuation."""
        return self.before / self.prompts

    @property
    def layers_per_token(self) -> float:
        """Mean number of decoder layers per token after the first of a prompt; nan without any."""
        return self.layer_runs / self.later if self.later else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Convert to strict JSON types, with the properties."""
        means = {"agreement": self.agreement, "departure": self.departure, "layers_per_token": self.layers_per_token}
        return strict_json(asdict(self) | means)


@dataclass(frozen=True)
class ExitQuality:
    """One exit, measured on all tokens.

    Attributes:
        layer: the layer of the exit.
        loss: mean next-token loss in nats.
        accuracy: share of tokens where its top-1 is the label.
        agreement: share of tokens where its top-1 is the final exit's.
        mean_confidence: mean maximum probability.
        ece: expected calibration error: |confidence - accuracy| over the bins, weighted by their tokens
            (Guo et al. 2017, arXiv 1706.04599).
        ece_agreement: the same with agreement instead of accuracy; an exit's confidence should predict agreement.
        bins: the reliability diagram, in equal bins of confidence.
        acceptance: of its drafts; None if it was not measured.
    """

    layer: int
    loss: float
    accuracy: float
    agreement: float
    mean_confidence: float
    ece: float
    ece_agreement: float
    bins: tuple[ReliabilityBin, ...]
    acceptance: DraftAcceptance | None = None

    @property
    def perplexity(self) -> float:
        """exp of the loss; inf if this is too large for a float."""
        return perplexity(self.loss)


@dataclass(frozen=True)
class AboveThreshold:
    """Tokens with at least the threshold's confidence at one exit, regardless of earlier exits.

    Means are NaN if there are none.
    """

    layer: int
    share: float
    agreement: float
    accuracy: float


@dataclass(frozen=True)
class SweepPoint:
    """One threshold of the sweep: each token leaves at the first exit whose confidence reaches it.

    Attributes:
        threshold: the required confidence.
        shares: share of tokens that leave at each exit, then at the final exit; they sum to 1.
        mean_layers: layers per token (see ``QualityAccumulator``), without the deferred layers.
        agreement: share of tokens where the emitted token is the final exit's top-1.
        accuracy: share of tokens where the emitted token is the label.
        above: per exit, the tokens that would leave if it were the only exit.
    """

    threshold: float
    shares: tuple[float, ...]
    mean_layers: float
    agreement: float
    accuracy: float
    above: tuple[AboveThreshold, ...]


@dataclass(frozen=True)
class Quality:
    """Quality of all exits on one set of tokens.

    Attributes:
        tokens: number of tokens.
        num_layers: the backbone's depth.
        final_loss: mean next-token loss of the final exit in nats.
        final_accuracy: share of tokens where its top-1 is the label.
        exits: by layer.
        sweep: by threshold.
        free_running: of all exits together; None if it was not measured.
    """

    tokens: int
    num_layers: int
    final_loss: float
    final_accuracy: float
    exits: tuple[ExitQuality, ...]
    sweep: tuple[SweepPoint, ...]
    free_running: FreeRunning | None = None

    @property
    def final_perplexity(self) -> float:
        """exp of the final exit's loss."""
        return perplexity(self.final_loss)

    def to_dict(self) -> dict[str, Any]:
        """Convert to strict JSON types, with perplexities and the acceptance's ``length`` and ``rate`` added, and
        non-finite numbers as None."""
        data = asdict(self) | {"final_perplexity": self.final_perplexity}
        for entry, exit_ in zip(data["exits"], self.exits, strict=True):
            entry["perplexity"] = exit_.perplexity
            if exit_.acceptance is not None:
                entry["acceptance"] |= {"length": exit_.acceptance.length, "rate": exit_.acceptance.rate}
        if self.free_running is not None:
            data["free_running"] = self.free_running.to_dict()
        return strict_json(data)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Quality:
        """The inverse of ``to_dict``. Additional keys are ignored; None becomes NaN.

        Raises:
            KeyError: a key is missing.
        """
        exits = tuple(
            _read(
                ExitQuality,
                exit_,
                bins=tuple(_read(ReliabilityBin, bin_) for bin_ in exit_["bins"]),
                # Older files do not have it.
                acceptance=_read(DraftAcceptance, exit_["acceptance"]) if exit_.get("acceptance") else None,
            )
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
        measured = data.get("free_running")  # older files do not have it
        free_running = _read(FreeRunning, measured) if measured else None
        return _read(cls, data, exits=exits, sweep=sweep, free_running=free_running)


def perplexity(loss: float) -> float:
    """exp(loss), or inf on overflow."""
    return math.exp(loss) if not loss > 709 else math.inf


def strict_json(value: Any) -> Any:
    """Convert tuples to lists and non-finite numbers to None."""
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [strict_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(kind: Any, data: dict[str, Any], **given: Any) -> Any:
    """Build a dataclass from a dict. None becomes NaN; additional keys are ignored."""
    plain = {field.name: data[field.name] for field in fields(kind) if field.name not in given}
    return kind(**given, **{name: math.nan if value is None else value for name, value in plain.items()})
