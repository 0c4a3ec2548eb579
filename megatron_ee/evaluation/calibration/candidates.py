"""Settings to test: exit thresholds with one parameter, from safe to fast, chosen on a part of the sample of its own.

The parameter is a level t: a token leaves at the first exit where the estimated probability that it is full mode's
token is at least t. Each exit has an estimate of its own, from its confidence c: ``sigmoid(logit(c) / temperature +
offset)``, temperature scaling (Guo et al., arXiv 1706.04599) of the event *the exit agrees with full mode*, with the
offset of Platt's scaling. It makes exits of different depth comparable, which one threshold for the raw confidences of
all exits (as in CALM, arXiv 2207.07061, and Fast yet Safe, arXiv 2405.20915) does not. The estimate grows with c, so
that a level is one threshold of c for each exit: the policy needs no temperature when it runs.

Temperature and offset are fitted to full mode's answers, forced at each exit. Up to the first token that differs, such
a run is what threshold mode itself does. So it also predicts which answers would differ at a level, and how many layers
would run. Nothing of this needs to be right for the guarantee, which rests on the other part of the sample; a good
choice makes it fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from megatron_ee.evaluation.statistics import Floats
from megatron_ee.inference.certificate import LEAST_SAVED, ExitScaling

LOGITS = np.arange(16.0, -4.0, -0.05)
"""Logits of the levels that are considered, from safe to fast."""
_CLOSEST = 2.0**-25
"""Confidences are float32 values. They are read as at most 1 minus this, and at least this."""
_PRIOR = 1.0
"""Weight of the prior of temperature 1 and offset 0, in squared units of 1 / temperature and of the offset."""
_FLATTEST = 0.05
"""Smallest 1 / temperature, for exits that are always right or do not know when they are."""


@dataclass(frozen=True)
class ForcedAnswer:
    """What the exits said at the tokens of one of full mode's answers, after its first token, which were forced.

    Attributes:
        confidences: ``[exits, tokens]``; 0 where an exit was not asked.
        agrees: whether the exit's token is full mode's, ``[exits, tokens]``.
    """

    confidences: Floats
    agrees: NDArray[np.bool_]


@dataclass(frozen=True)
class CandidateSetting:
    """Exit thresholds of one level.

    Attributes:
        level: the estimated probability of agreement at which a token leaves.
        thresholds: confidences by layer. Exits that reach the level at no confidence are left out.
        differing: share of the forced answers that would differ from full mode's.
        skipped: layers that would be skipped per token.
    """

    level: float
    thresholds: Mapping[int, float]
    differing: float
    skipped: float


def fit_scaling(layer: int, confidences: Floats, agrees: NDArray[np.bool_]) -> ExitScaling | None:
    """Fit an exit's temperature and offset by maximum likelihood with a weak prior.

    Args:
        layer: of the exit.
        confidences: ``[tokens]`` in [0, 1].
        agrees: ``[tokens]``.

    Returns:
        None if there are no tokens.
    """
    if not len(confidences):
        return None
    x = np.stack((_logit(confidences), np.ones(len(confidences))))
    prior = np.array([1.0, 0.0])

    def objective(weights: Floats) -> tuple[float, Floats]:
        logits = weights @ x
        away = weights - prior
        value = np.logaddexp(0, logits).sum() - logits[agrees].sum() + _PRIOR * (away @ away) / 2
        return float(value) / len(agrees), (x @ (_sigmoid(logits) - agrees) + _PRIOR * away) / len(agrees)

    bounds = [(_FLATTEST, None), (None, None)]
    weights = minimize(objective, prior, jac=True, method="L-BFGS-B", bounds=bounds).x
    return ExitScaling(
        layer=layer,
        temperature=float(1 / weights[0]),
        offset=float(weights[1]),
        tokens=len(agrees),
        agreement=float(np.mean(agrees)),
    )


def threshold(scaling: ExitScaling, logit: float) -> float:
    """The confidence at which the logit of an exit's estimated probability of agreement is ``logit``."""
    return max(float(_sigmoid((logit - scaling.offset) * scaling.temperature)), _CLOSEST)


def thresholds_at(scalings: Sequence[ExitScaling], logit: float) -> dict[int, float]:
    """By layer, the confidences at which a token leaves at the level with this logit.

    Exits that reach the level at no confidence are left out.
    """
    thresholds = {each.layer: threshold(each, logit) for each in scalings}
    return {layer: value for layer, value in thresholds.items() if value < 1 - _CLOSEST}


def level_decimals(level: float) -> int:
    """Decimals that tell a level from 1: the safest levels are very close to it."""
    return 5 if level == 1 else max(5, 1 - math.floor(math.log10(1 - level)))


def candidate_settings(
    answers: Sequence[ForcedAnswer],
    layers: Sequence[int],
    num_layers: int,
    points: int,
    likely_differing: float,
    most_differing: float,
) -> tuple[list[ExitScaling], list[CandidateSetting]]:
    """Fit the scaling of each exit, and choose settings from safe to fast.

    Args:
        answers: of the records of one part of the sample.
        layers: of the exits, in the order of the answers' first axis.
        num_layers: number of backbone layers.
        points: largest number of settings.
        likely_differing: share of answers that differ at the fastest setting that is likely to pass. Up to there, the
            settings skip evenly spaced numbers of layers. If faster ones are to be tested, they get half of the points.
        most_differing: the fastest setting is the last at which at most this share of the answers is predicted to
            differ.

    Returns:
        The scaling of each exit that can be used, and the settings, none if no exit would save anything.
    """
    confidences = np.concatenate([each.confidences for each in answers], axis=1)
    agrees = np.concatenate([each.agrees for each in answers], axis=1)
    ends = np.cumsum([each.agrees.shape[1] for each in answers])
    fitted = (
        fit_scaling(layer, own[own > 0], right[own > 0])
        for layer, own, right in zip(layers, confidences, agrees, strict=True)
    )
    scalings = [each for each in fitted if each is not None]
    candidates: list[CandidateSetting] = []
    for logit in LOGITS:
        thresholds = thresholds_at(scalings, logit)
        lowest = np.array([thresholds.get(layer, np.inf) for layer in layers])
        differing, skipped = _predict(confidences, agrees, ends, lowest, num_layers - np.array(layers))
        if skipped >= LEAST_SAVED * num_layers and (not candidates or differing <= most_differing):
            candidates.append(CandidateSetting(float(_sigmoid(logit)), thresholds, differing, skipped))
    likely = next((i for i, each in enumerate(candidates) if i and each.differing > likely_differing), len(candidates))
    points_of_likely = points if likely == len(candidates) else math.ceil(points / 2)
    chosen = _evenly(candidates[:likely], points_of_likely, 0.0)
    return scalings, chosen + _evenly(
        candidates[likely:], points - points_of_likely, candidates[likely - 1].skipped if candidates else 0.0
    )


def _predict(
    confidences: Floats, agrees: NDArray[np.bool_], ends: NDArray[np.int64], lowest: Floats, saves: NDArray[np.int64]
) -> tuple[float, float]:
    """Share of the answers that differ, and layers skipped per token, if tokens leave at these thresholds."""
    leaves = confidences >= lowest[:, None]
    first, leaving = leaves.argmax(axis=0), leaves.any(axis=0)
    columns = np.arange(leaves.shape[1])
    wrong = leaving & ~agrees[first, columns]
    total = np.concatenate(([0], np.cumsum(wrong)))
    per_answer = np.diff(total[np.concatenate(([0], ends))])
    return float((per_answer > 0).mean()), float(np.where(leaving, saves[first], 0).sum() / max(len(columns), 1))


def _evenly(candidates: Sequence[CandidateSetting], points: int, start: float) -> list[CandidateSetting]:
    """At most ``points`` of the candidates, which get faster, at evenly spaced skipped layers from ``start``."""
    if not candidates:
        return []
    fastest = max(each.skipped for each in candidates)
    chosen: list[CandidateSetting] = []
    for target in np.linspace(start, fastest, points + 1)[1:]:
        candidate = next(each for each in candidates if each.skipped >= target * (1 - 1e-9))
        if not chosen or candidate is not chosen[-1]:
            chosen.append(candidate)
    return chosen


def _logit(confidences: Floats) -> Floats:
    inside = np.clip(confidences, _CLOSEST, 1 - _CLOSEST)
    return np.log(inside) - np.log1p(-inside)


def _sigmoid(values: Floats | float) -> Floats:
    return 0.5 * (1 + np.tanh(np.asarray(values, dtype=np.float64) / 2))
