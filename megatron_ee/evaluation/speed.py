"""Speed of decoding with exits against full mode, on the beginnings of held-out documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.loading import engine_on_ranks
from megatron_ee.inference.offline import compare_modes
from megatron_ee.inference.policy import GatePolicy, ThresholdPolicy
from megatron_ee.inference.requests import Request
from megatron_ee.model.quality import SweepPoint
from megatron_ee.parallel.layout import Layout

PROMPTS, PROMPT_TOKENS, TOKENS = 4, 64, 32
"""Prompts, tokens of each for plain text, and tokens that are generated after each."""
ROUNDS = 2
"""Timed rounds of all modes, after a round that is not."""
WANTED_AGREEMENT, HIGHEST = 0.95, 0.99
"""Agreement with the final exit that the threshold should give, and the threshold if none was measured that does."""


@dataclass(frozen=True)
class ModeSpeed:
    """One mode on some prompts, one after another.

    Attributes:
        mode: ``full``, ``threshold``, ``gate`` (threshold mode with policy ``gate``) or ``speculative``.
        threshold: of the exits; None for the modes without one.
        tokens_per_second: with the passes of the prompts.
        speedup: ``tokens_per_second`` over that of full mode.
        agreement: share of tokens that are full mode's.
        layers_per_token: decoder layers run per token.
    """

    mode: str
    threshold: float | None
    tokens_per_second: float
    speedup: float
    agreement: float
    layers_per_token: float


def measure_speed(
    stage: Stage,
    layout: Layout,
    specs: Sequence[ExitSpec],
    prompts: Sequence[Sequence[int]],
    eos: frozenset[int],
    threshold: float,
    gate_threshold: float | None = None,
) -> tuple[ModeSpeed, ...]:
    """Decode greedily after ``prompts`` in every mode. Every rank calls this and gets the result.

    Args:
        stage: with the final exit and the exits.
        layout: all layers, spread evenly, with each exit on the stage of its layer.
        specs: the exits of all stages.
        prompts: token ids, at least one prompt.
        eos: end-of-text tokens.
        threshold: of threshold mode.
        gate_threshold: with it policy ``gate`` is measured too, with the exits that have gates, if any.

    Raises:
        ConfigError: there is not enough memory for the KV cache.
    """
    groups = stage.setup.groups
    settings: dict[str, dict[str, Any]] = {
        "full": {"mode": "full"},
        "threshold": {"mode": "threshold", "policy": ThresholdPolicy(threshold=threshold)},
        "speculative": {"mode": "speculative"},
    }
    gated = tuple(spec.layer for spec in specs if spec.gate)
    if gate_threshold is not None and gated:
        settings["gate"] = {"mode": "threshold", "policy": GatePolicy(threshold=gate_threshold), "exits": gated}
    thresholds = {"threshold": threshold, "gate": gate_threshold}
    found: list[ModeSpeed] = []

    def work() -> None:
        # The other model copies open an engine, which needs all ranks, and leave it alone.
        with engine_on_ranks(stage, layout, specs, eos=eos) as engine:
            if engine is None or not groups.is_main:
                return
            requests = [Request(prompt=tuple(prompt), max_tokens=TOKENS) for prompt in prompts]
            results = compare_modes(engine, requests, settings, rounds=ROUNDS)
        for each in results:
            speed = each.tokens_per_second
            figures = (speed, speed / results[0].tokens_per_second, each.agreement, each.layers_per_token)
            found.append(ModeSpeed(each.mode, thresholds.get(each.mode), *figures))

    groups.together(work)
    return groups.from_first(lambda: tuple(found))


def good_threshold(sweep: Sequence[SweepPoint]) -> float:
    """The lowest threshold of a sweep with at least ``WANTED_AGREEMENT``; ``HIGHEST`` if none has it."""
    return min((point.threshold for point in sweep if point.agreement >= WANTED_AGREEMENT), default=HIGHEST)
