"""Forecasts the decoding speed of sets of exits, from what exits say of each token and from measured times.

The records are of given text: each exit reads the text's own tokens. While decoding it would read the model's, which
may differ after an early token. One sequence is decoded alone and greedily.

Pure: numpy on the CPU, no model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ee.inference.policy import MAX_DEFERRED
from megatron_ee.inference.speculation import MAX_LENGTH

MOST_EXITS = 3
"""Exits in a set: each one that a token asks without leaving costs a head."""
STARTS = 4
"""Single exits that sets are grown from."""
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.97, 0.98, 0.99, 0.995)
"""Thresholds that are tried."""
QUANTILES = 20
"""Parts of the tokens, by confidence, of ``calibrated``."""


@dataclass(frozen=True)
class Records:
    """What exits say of tokens, in the order of the text.

    Attributes:
        layers: of the exits, ascending.
        confidence: ``[exits, tokens]`` float32.
        agrees: ``[exits, tokens]`` bool: whether the exit's top-1 token is the final exit's.
        starts: ``[tokens]`` bool: whether the token does not follow the one before it in the text.
    """

    layers: tuple[int, ...]
    confidence: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    starts: NDArray[np.bool_]

    def rows(self, exits: Sequence[int]) -> list[int]:
        """Indices of exits, given by their layers."""
        return [self.layers.index(layer) for layer in exits]


@dataclass(frozen=True)
class DecodeTimes:
    """Measured seconds of work on a few tokens, by their number.

    Attributes:
        num_layers: depth of the model.
        layer: one decoder layer.
        head: final norm and LM head.
        body: an exit's body.
        skipped: whether a body replaces part of its layer (tap ``residual``), so that a token that leaves has not run
            this part, which takes as long as the body.
    """

    num_layers: int
    layer: Mapping[int, float]
    head: Mapping[int, float]
    body: Mapping[int, float]
    skipped: bool

    def layers(self, count: float, tokens: NDArray[np.int64]) -> float:
        """Passes of ``tokens`` tokens each through ``count`` layers, in sum."""
        return count * float(_at(self.layer, tokens).sum())

    def depth(self, layer: int) -> float:
        """Layers that a token has run when it reaches the exit after ``layer``."""
        return layer - (min(1.0, self.body[1] / self.layer[1]) if self.skipped else 0.0)

    def asked(self, *, gated: bool = False) -> float:
        """One token that asks an exit: body and head. A gate costs nothing, and decides before the head runs."""
        return self.body[1] + (0.0 if gated else self.head[1])

    def full(self) -> float:
        """One token of full mode."""
        return self.num_layers * self.layer[1] + self.head[1]


@dataclass(frozen=True)
class Forecast:
    """The speed of one setting.

    Attributes:
        exits: layers of the exits; none for full mode.
        agreement: share of tokens that equal the final exit's.
        seconds: per token.
        speedup: against full mode.
        early: share of tokens that leave early (threshold mode).
        threshold: of threshold mode; None for another mode.
        gated: whether the exits' gates decide (policy ``gate``).
        draft_length: proposals per round of speculative mode; None for another mode.
        tokens_per_round: of speculative mode.
    """

    exits: tuple[int, ...]
    agreement: float
    seconds: float
    speedup: float
    early: float = 0.0
    threshold: float | None = None
    gated: bool = False
    draft_length: int | None = None
    tokens_per_round: float | None = None


def threshold_forecast(
    records: Records, times: DecodeTimes, exits: Sequence[int], threshold: float, *, gated: bool = False
) -> Forecast:
    """Threshold mode: a token leaves at the first exit that is confident enough.

    Tokens that left wait, and join the next token that goes deeper: one pass runs them all. After ``MAX_DEFERRED``
    early tokens one runs all layers without asking an exit. Back-off is left out: it saves heads.

    ``gated``: the confidence is a gate's probability, so that only a token that leaves runs the exit's head.
    """
    rows, last = records.rows(exits), len(exits)
    tokens = np.arange(len(records.starts))
    confident = records.confidence[rows] >= np.float32(threshold)
    first = np.where(confident.any(axis=0), confident.argmax(axis=0), last)
    stayed = np.maximum.accumulate(np.where(first == last, tokens, -1))
    forced = (first < last) & ((tokens - stayed) % (MAX_DEFERRED + 1) == 0)
    left = np.where(forced, last, first)
    early = left < last
    agreed = ~early
    agreed[early] = records.agrees[rows][left[early], tokens[early]]
    depths = [*(times.depth(layer) for layer in exits), float(times.num_layers)]
    seconds = times.layers(depths[0], np.ones(len(tokens), dtype=np.int64))
    for place in range(last):
        seconds += np.count_nonzero(~forced & (first >= place)) * times.asked(gated=gated)
        deeper = np.flatnonzero(left > place)
        together = np.diff(deeper, prepend=-1)  # the token, and those that waited for it
        seconds += times.layers(depths[place + 1] - depths[place], together)
    seconds += (len(tokens) if gated else np.count_nonzero(~early)) * times.head[1]
    each, share = seconds / len(tokens), float(early.mean())
    return Forecast(
        tuple(exits), float(agreed.mean()), each, times.full() / each, early=share, threshold=threshold, gated=gated
    )


def speculative_forecast(records: Records, times: DecodeTimes, layer: int, draft_length: int) -> Forecast:
    """Speculative mode with drafts of a fixed length by one exit. Its output is the full model's.

    In a round, ``draft_length + 1`` tokens run the layers up to the exit one by one, all but the last ask it, and all
    run the remaining layers together. A draft is accepted up to the first token on which the exit disagrees, and the
    final exit adds one token. Ending a draft early, which the engine does, is left out.
    """
    agrees, starts = records.agrees[records.layers.index(layer)], records.starts
    runs = _agreeing_runs(agrees, starts)
    ends = np.append(np.flatnonzero(starts)[1:], len(starts))  # of each stretch of adjacent tokens
    remaining = ends[np.cumsum(starts) - 1] - np.arange(len(starts))
    steps = np.minimum(np.minimum(runs, draft_length) + 1, remaining).tolist()
    place = rounds = 0
    while place < len(steps):
        place += steps[place]
        rounds += 1
    together = np.array([draft_length + 1])
    depth = times.depth(layer)
    seconds = (
        (draft_length + 1) * depth * times.layer[1]
        + draft_length * times.asked()
        + times.layers(times.num_layers - depth, together)
        + float(_at(times.head, together)[0])
    )
    gained = len(steps) / rounds
    each = seconds / gained
    return Forecast((layer,), 1.0, each, times.full() / each, draft_length=draft_length, tokens_per_round=gained)


def best_threshold(
    records: Records, times: DecodeTimes, agreements: Sequence[float], *, gated: bool = False
) -> list[Forecast]:
    """For each smallest agreement, the fastest set of up to ``MOST_EXITS`` exits and its threshold.

    Sets are found by ``grow``. Full mode, with no exits, where nothing is faster. ``gated``: see
    ``threshold_forecast``.
    """

    @functools.cache
    def swept(exits: tuple[int, ...]) -> list[Forecast]:
        return [threshold_forecast(records, times, exits, threshold, gated=gated) for threshold in THRESHOLDS]

    full = Forecast((), 1.0, times.full(), 1.0)

    def fastest(agreement: float, exits: tuple[int, ...]) -> Forecast:
        return max((each for each in swept(exits) if each.agreement >= agreement), key=_speedup, default=full)

    return [
        max(full, grow(records.layers, functools.partial(fastest, agreement)), key=_speedup) for agreement in agreements
    ]


def grow(layers: Sequence[int], fastest: Callable[[tuple[int, ...]], Forecast]) -> Forecast:
    """The best set: from each of the fastest single exits, exits are added one at a time while that is faster.

    Args:
        layers: of the exits.
        fastest: the forecast of a set of exits, ascending.
    """
    singles: list[tuple[int, ...]] = [(layer,) for layer in layers]
    singles.sort(key=lambda exits: fastest(exits).speedup, reverse=True)
    ends = []
    for exits in singles[:STARTS]:
        while len(exits) < MOST_EXITS:
            wider = [tuple(sorted((*exits, layer))) for layer in layers if layer not in exits]
            next_ = max(wider, key=lambda exits: fastest(exits).speedup, default=exits)
            if fastest(next_).speedup <= fastest(exits).speedup:
                break
            exits = next_
        ends.append(fastest(exits))
    return max(ends, key=_speedup)


def calibrated(records: Records) -> Records:
    """The records with each confidence replaced by the share of the tokens of similar confidence that agree.

    That is what a gate would say that knows no more than the head. A similar confidence is one of the same exit and the
    same of ``QUANTILES`` equal parts.
    """
    chances = np.empty_like(records.confidence)
    for chance, confidence, agrees in zip(chances, records.confidence, records.agrees, strict=True):
        for part in np.array_split(np.argsort(confidence, kind="stable"), min(QUANTILES, len(confidence))):
            chance[part] = agrees[part].mean()
    return dataclasses.replace(records, confidence=chances)


def best_speculative(records: Records, times: DecodeTimes) -> Forecast:
    """The fastest exit and draft length."""
    return max(
        (
            speculative_forecast(records, times, layer, length)
            for layer in records.layers
            for length in range(1, MAX_LENGTH + 1)
        ),
        key=_speedup,
    )


def _speedup(forecast: Forecast) -> float:
    return forecast.speedup


def _agreeing_runs(agrees: NDArray[np.bool_], starts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each token, how many from it on agree without a break, up to the end of the stretch."""
    places = np.arange(len(agrees))
    broken = np.where(~agrees, places, len(agrees))
    next_start = np.where(np.append(starts[1:], True), places + 1, len(agrees))
    stop = np.minimum(broken, next_start)
    return np.minimum.accumulate(stop[::-1])[::-1] - places


def _at(table: Mapping[int, float], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Seconds for these numbers of tokens: between measured numbers, on the line through them."""
    sizes = sorted(table)
    return np.interp(tokens, sizes, [table[size] for size in sizes])
