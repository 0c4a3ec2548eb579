"""Offline inference: a batch of requests of any size, or a comparison of the modes on the same prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_ee.inference.engine import Engine
from megatron_ee.inference.requests import Completion, Request

T = TypeVar("T")
MODES: Mapping[str, Mapping[str, Any]] = {mode: {"mode": mode} for mode in ("full", "threshold", "speculative")}
"""What to compare by default: names, and the fields of a request that differ."""
Outcome = Completion | str
"""The completion of one output, or an error message of one line."""


def run_batch(
    engine: Engine,
    requests: Sequence[Request],
    *,
    ahead: int = 32,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[int, list[Outcome]]]:
    """Run all requests concurrently. A request that fails does not end the others.

    Args:
        engine: without other requests; their events would be lost.
        requests: to run.
        ahead: maximum number of unfinished requests in the engine.
        advance: called with a request's number of tokens when it finishes.

    Yields:
        The index of each request as it finishes, and its outcomes by sample.

    Raises:
        ConfigError: a request is invalid, as from ``Engine.check``.
    """
    indices: dict[int, int] = {}  # by number in the engine
    found: dict[int, dict[int, Outcome]] = {}
    started = 0
    while started < len(requests) or indices:
        while started < len(requests) and len(indices) < ahead:
            indices[engine.submit(requests[started])] = started
            started += 1
        for event in engine.step():
            outcome = event.completion if event.error is None else event.error
            if outcome is None or event.request not in indices:
                continue
            index = indices[event.request]
            outcomes = found.setdefault(index, {})
            outcomes[event.sample] = outcome
            if len(outcomes) == requests[index].samples:
                del indices[event.request], found[index]
                advance(sum(len(each.tokens) for each in outcomes.values() if isinstance(each, Completion)))
                yield index, [outcome for _, outcome in sorted(outcomes.items())]


def in_order(results: Iterable[tuple[int, T]]) -> Iterator[T]:
    """The results of ``run_batch`` in the order of the requests. Results wait for those before them."""
    held: dict[int, T] = {}
    following = 0
    for index, result in results:
        held[index] = result
        while following in held:
            yield held.pop(following)
            following += 1


@dataclass(frozen=True)
class ModeResult:
    """Results of one mode on all prompts, run one after another.

    Attributes:
        mode: its name.
        seconds: time for all prompts, including prefill; median over the rounds.
        tokens_per_second: emitted tokens divided by ``seconds``.
        mean_exit_layer: mean layer of the emitted tokens.
        layers_per_token: decoder layers run per token, including those for rejected proposals.
        agreement: share of positions at which this mode emits the same token as full mode.
        outputs: completions of the last round.
    """

    mode: str
    seconds: float
    tokens_per_second: float
    mean_exit_layer: float
    layers_per_token: float
    agreement: float
    outputs: tuple[Completion, ...]


def compare_modes(
    engine: Engine,
    requests: Sequence[Request],
    modes: Mapping[str, Mapping[str, Any]] = MODES,
    *,
    rounds: int = 3,
) -> list[ModeResult]:
    """Run ``requests`` in every mode and compare.

    The modes alternate within each round, so that changes of the machine's speed affect all of them. One additional
    round before the others is a warm-up. Agreement of threshold mode is measured with full mode's output forced;
    agreement of speculative mode on its own output, which differs from full mode's only by rounding.

    Args:
        engine: without other requests.
        requests: one output each.
        modes: valid fields that replace those of the requests, by name; ``full`` is compared with.
        rounds: that are timed.

    Raises:
        UserError: a request is invalid or fails.
    """
    asked = {mode: [each.model_copy(update=dict(changes)) for each in requests] for mode, changes in modes.items()}
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    outputs: dict[str, list[Completion]] = {}
    for number in range(1 + rounds):
        for mode, some in asked.items():
            started = time.perf_counter()
            outputs[mode] = [engine.generate([request])[0][0] for request in some]
            if number > 0:
                times[mode].append(time.perf_counter() - started)
    agreements = {mode: _agreement(engine, some, outputs[mode], outputs["full"]) for mode, some in asked.items()}
    return [_result(mode, statistics.median(times[mode]), outputs[mode], agreements[mode]) for mode in modes]


def _agreement(
    engine: Engine, requests: Sequence[Request], emitted: Sequence[Completion], truth: Sequence[Completion]
) -> float:
    if requests[0].mode == "threshold":
        forced = [tuple(token.id for token in each.tokens) for each in truth]
        emitted = [
            engine.generate([request.model_copy(update={"forced_ids": given})])[0][0]
            for request, given in zip(requests, forced, strict=True)
        ]
    pairs = [
        mine.id == theirs.id
        for ours, full in zip(emitted, truth, strict=True)
        for mine, theirs in zip(ours.tokens, full.tokens, strict=False)
    ]
    return statistics.fmean(pairs)


def _result(mode: str, seconds: float, outputs: Sequence[Completion], agreement: float) -> ModeResult:
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
