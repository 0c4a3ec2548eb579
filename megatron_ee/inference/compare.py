"""The three modes side by side on the same prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ee.inference.engine import Engine
from megatron_ee.inference.requests import Completion, Mode, Request


@dataclass(frozen=True)
class ModeResult:
    """One mode on all prompts, one after another.

    Attributes:
        seconds: median over the rounds, prompts included.
        tokens_per_second: emitted tokens over that.
        mean_exit_layer: of the emitted tokens.
        layers_per_token: decoder layers run per token, those of rejected proposals included.
        agreement: share of positions along full mode's output at which the same token is emitted.
        outputs: of the last round.
    """

    mode: Mode
    seconds: float
    tokens_per_second: float
    mean_exit_layer: float
    layers_per_token: float
    agreement: float
    outputs: tuple[Completion, ...]


def compare_modes(engine: Engine, requests: Sequence[Request], rounds: int = 3) -> list[ModeResult]:
    """Answer ``requests`` in every mode, in turns, so that all see the same machine; the first round only warms.

    Speculative mode's agreement is counted on its own output, which is full mode's but for rounding.

    Raises:
        UserError: a request is refused, or fails.
    """
    modes: tuple[Mode, ...] = ("full", "threshold", "speculative")
    times: dict[Mode, list[float]] = {mode: [] for mode in modes}
    outputs: dict[Mode, list[Completion]] = {}
    for number in range(1 + rounds):
        for mode in modes:
            started = time.perf_counter()
            outputs[mode] = [engine.generate([replace(request, mode=mode)])[0][0] for request in requests]
            if number > 0:
                times[mode].append(time.perf_counter() - started)
    return [
        _result(mode, statistics.median(times[mode]), outputs[mode], _agreement(engine, requests, mode, outputs))
        for mode in modes
    ]


def _agreement(engine: Engine, requests: Sequence[Request], mode: Mode, outputs: dict[Mode, list[Completion]]) -> float:
    said, truth = outputs[mode], outputs["full"]
    if mode == "threshold":
        follow = [tuple(token.id for token in each.tokens) for each in truth]
        said = [
            engine.generate([replace(request, mode=mode, follow=given)])[0][0]
            for request, given in zip(requests, follow, strict=True)
        ]
    pairs = [
        mine.id == theirs.id
        for ours, full in zip(said, truth, strict=True)
        for mine, theirs in zip(ours.tokens, full.tokens, strict=False)
    ]
    return statistics.fmean(pairs)


def _result(mode: Mode, seconds: float, outputs: Sequence[Completion], agreement: float) -> ModeResult:
    count = sum(len(each.tokens) for each in outputs)
    layers = [token.layer for each in outputs for token in each.tokens]
    paid = [each.statistics["layers_per_token"] for each in outputs if each.statistics["layers_per_token"] is not None]
    return ModeResult(
        mode,
        seconds,
        count / seconds,
        statistics.fmean(layers),
        statistics.fmean(paid) if paid else float(max(layers)),
        agreement,
        tuple(outputs),
    )
