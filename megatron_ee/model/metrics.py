"""Metrics per exit: loss, agreement with the final exit, calibration, and a threshold sweep.

``QualityAccumulator`` adds up per-token statistics of microbatches. It keeps only sums, so the result does not depend
on the split into microbatches, and the sums of data-parallel ranks can be added. Pure: torch on the CPU, no process
groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ee.errors import DataError
from megatron_ee.model.quality import AboveThreshold, ExitQuality, Quality, ReliabilityBin, SweepPoint


@dataclass(frozen=True)
class TokenStats:
    """One exit's results per token.

    Attributes:
        loss: [tokens] float32, nats.
        confidence: [tokens] float32, the maximum softmax probability.
        top1: [tokens] int64, the most probable token id.
    """

    loss: Tensor
    confidence: Tensor
    top1: Tensor


@dataclass(frozen=True)
class FinalStats:
    """The final exit's results per token; ``loss`` and ``top1`` as in ``TokenStats``."""

    loss: Tensor
    top1: Tensor


class QualityAccumulator:
    """Sums over tokens, from which ``Quality`` is computed.

    ``sums`` is one flat float64 tensor on the CPU. Its layout depends only on exits, thresholds and bins, so the
    tensors of several ranks can be added (all-reduced in place), or merged with ``merge``. Counts below 2**53 are
    exact.
    """

    def __init__(
        self,
        exit_layers: Sequence[int],
        num_layers: int,
        thresholds: Sequence[float],
        bins: int = 15,
        body_layers: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            exit_layers: the layer of each exit, ascending, from 1 to ``num_layers``.
            num_layers: depth of the backbone.
            thresholds: thresholds of the sweep; above 1 no token leaves early.
            bins: number of equal bins of confidence for calibration.
            body_layers: decoder layers in each exit's own body (1 for ``layer``, else 0; default all 0). A token that
                reaches an exit has run its body, even if it does not leave there. Heads and MLPs are not counted.

        Raises:
            ValueError: the arguments do not fit together.
        """
        layers = tuple(exit_layers)
        own = tuple(body_layers) if body_layers is not None else (0,) * len(layers)
        if list(layers) != sorted(set(layers)) or (layers and not 1 <= layers[0] <= layers[-1] <= num_layers):
            raise ValueError(f"exit_layers must rise within 1 to {num_layers}, not {layers}")
        if len(own) != len(layers):
            raise ValueError(f"body_layers must have one entry for each of {len(layers)} exits, not {len(own)}")
        if bins < 1:
            raise ValueError(f"bins must be at least 1, not {bins}")
        self.exit_layers, self.num_layers, self.bins = layers, num_layers, bins
        self.thresholds = tuple(float(threshold) for threshold in thresholds)
        run = [layer + sum(own[: index + 1]) for index, layer in enumerate(layers)]
        self.layers_run = torch.tensor([*run, num_layers + sum(own)], dtype=torch.float64)
        exits, points = len(layers), len(self.thresholds)
        shapes = {
            "final": (3,),  # tokens, loss, label hit
            "loss": (exits,),
            "bins": (exits, bins, 4),  # tokens, confidence, label hit, agreement
            "left": (points, exits + 1, 3),  # tokens, label hit, agreement
            "above": (points, exits, 3),
        }
        sizes = [math.prod(shape) for shape in shapes.values()]
        self.sums = torch.zeros(sum(sizes), dtype=torch.float64)
        parts = self.sums.split(sizes)
        self._sums = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def update(self, exits: Sequence[TokenStats], final: TokenStats | FinalStats, labels: Tensor, mask: Tensor) -> None:
        """Add one microbatch. An empty mask adds nothing.

        Args:
            exits: one per exit, in the order of ``exit_layers``.
            final: the final exit's results.
            labels: [tokens] int64.
            mask: [tokens] bool, whether the token counts.

        Raises:
            ValueError: the number of exits is wrong, or shapes differ.
        """
        if len(exits) != len(self.exit_layers):
            raise ValueError(f"expected {len(self.exit_layers)} exits, not {len(exits)}")
        shape = labels.shape
        given = [mask, final.loss, final.top1, *(t for e in exits for t in (e.loss, e.confidence, e.top1))]
        if labels.dim() != 1 or any(tensor.shape != shape for tensor in given):
            raise ValueError(f"all tensors must be [tokens] as labels are, not {[tuple(t.shape) for t in given]}")

        counted = mask.bool().cpu()

        def pick(tensor: Tensor) -> Tensor:
            # On the CPU, where the final exit's cached results are.
            return tensor.detach().cpu()[counted]

        labels, final_top1 = pick(labels), pick(final.top1)
        one = torch.ones(len(labels), dtype=torch.float64)
        hit = (final_top1 == labels).double()
        self._sums["final"] += torch.stack([one.sum(), pick(final.loss).double().sum(), hit.sum()])

        confidences, outcomes = [], []
        for index, stats in enumerate(exits):
            confidence, top1 = pick(stats.confidence), pick(stats.top1)
            outcome = torch.stack([one, (top1 == labels).double(), (top1 == final_top1).double()], dim=1)
            self._sums["loss"][index] += pick(stats.loss).double().sum()
            self._add_bins(index, confidence.double(), outcome)
            confidences.append(confidence)
            outcomes.append(outcome)
        outcomes.append(torch.stack([one, hit, one], dim=1))
        for index, threshold in enumerate(self.thresholds):
            staying = torch.ones(len(labels), dtype=torch.bool)
            for which, confidence in enumerate(confidences):
                # In the confidence's dtype, so that decoding makes the same decision.
                above = confidence >= threshold
                self._sums["above"][index, which] += outcomes[which][above].sum(0)
                self._sums["left"][index, which] += outcomes[which][above & staying].sum(0)
                staying &= ~above
            self._sums["left"][index, -1] += outcomes[-1][staying].sum(0)

    def _add_bins(self, index: int, confidence: Tensor, outcome: Tensor) -> None:
        where = (confidence * self.bins).ceil().long().sub_(1).clamp_(0, self.bins - 1)
        rows = torch.stack([outcome[:, 0], confidence, outcome[:, 1], outcome[:, 2]], dim=1)
        self._sums["bins"][index].index_add_(0, where, rows)

    def merge(self, other: QualityAccumulator) -> None:
        """Add another accumulator's sums.

        Raises:
            ValueError: it has other exits, thresholds or bins.
        """
        mine, theirs = (
            (a.exit_layers, a.num_layers, a.thresholds, a.bins, a.layers_run.tolist()) for a in (self, other)
        )
        if mine != theirs:
            raise ValueError(f"cannot merge accumulators of {mine} and {theirs}")
        self.sums += other.sums

    def result(self) -> Quality:
        """Quality over all tokens so far.

        Raises:
            DataError: there was no unmasked token.
        """
        tokens, loss, hit = self._sums["final"].tolist()
        if not tokens:
            raise DataError("validation data: no unmasked token; give data whose loss mask is not all zero")
        return Quality(
            tokens=int(tokens),
            num_layers=self.num_layers,
            final_loss=loss / tokens,
            final_accuracy=hit / tokens,
            exits=tuple(self._exit(index, tokens) for index in range(len(self.exit_layers))),
            sweep=tuple(self._point(index, tokens) for index in range(len(self.thresholds))),
        )

    def _exit(self, index: int, tokens: float) -> ExitQuality:
        rows = self._sums["bins"][index]
        _, confidence, hit, agree = rows.unbind(1)
        return ExitQuality(
            layer=self.exit_layers[index],
            loss=self._sums["loss"][index].item() / tokens,
            accuracy=hit.sum().item() / tokens,
            agreement=agree.sum().item() / tokens,
            mean_confidence=confidence.sum().item() / tokens,
            ece=(confidence - hit).abs().sum().item() / tokens,
            ece_agreement=(confidence - agree).abs().sum().item() / tokens,
            bins=tuple(
                ReliabilityBin(step / self.bins, (step + 1) / self.bins, int(row[0]), *_means(row))
                for step, row in enumerate(rows.tolist())
            ),
        )

    def _point(self, index: int, tokens: float) -> SweepPoint:
        left = self._sums["left"][index]
        _, hit, agree = left.sum(0).tolist()
        above = self._sums["above"][index].tolist()
        return SweepPoint(
            threshold=self.thresholds[index],
            shares=tuple(count / tokens for count in left[:, 0].tolist()),
            mean_layers=(left[:, 0] @ self.layers_run).item() / tokens,
            agreement=agree / tokens,
            accuracy=hit / tokens,
            above=tuple(
                AboveThreshold(layer, row[0] / tokens, agreement=_means(row)[1], accuracy=_means(row)[0])
                for layer, row in zip(self.exit_layers, above, strict=True)
            ),
        )


def _means(row: list[float]) -> list[float]:
    """The sums of a row divided by the count in its first entry; NaN if it is 0."""
    return [value / row[0] if row[0] else math.nan for value in row[1:]]
