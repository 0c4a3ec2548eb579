"""Forecasts of speed: by hand, against token-by-token replays, and against the best of all sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_ee.evaluation.probe.forecast import (
    MOST_EXITS,
    THRESHOLDS,
    DecodeTimes,
    Forecast,
    Records,
    best_speculative,
    best_threshold,
    calibrated,
    grow,
    speculative_forecast,
    threshold_forecast,
)

SIZES = (1, 2, 4, 8, 16)
FLAT = dict.fromkeys(SIZES, 1.0)
TIMES = DecodeTimes(10, layer=FLAT, head=dict.fromkeys(SIZES, 2.0), body=dict.fromkeys(SIZES, 0.5), skipped=False)
"""A pass over several tokens costs as much as one over one token: a layer 1, an asked exit 2.5, full mode 12."""
RISING = DecodeTimes(
    12,
    layer={1: 1.0, 2: 1.1, 4: 1.4, 8: 2.0, 16: 3.1},
    head={1: 1.5, 2: 1.6, 4: 1.8, 8: 2.2, 16: 3.0},
    body={1: 0.6, 2: 0.7, 4: 0.9, 8: 1.3, 16: 2.0},
    skipped=True,
)


def records(layers: tuple[int, ...], confidence: list[list[float]], agrees: list[list[int]]) -> Records:
    starts = np.zeros(len(confidence[0]), dtype=bool)
    starts[0] = True
    return Records(layers, np.array(confidence, dtype=np.float32), np.array(agrees, dtype=bool), starts)


def random_records(layers: tuple[int, ...], tokens: int, seed: int) -> Records:
    """Later exits agree more often, and confidence says something about it."""
    draw = np.random.default_rng(seed)
    hard = draw.random(tokens)
    ease = np.array([0.25 + 0.6 * place / len(layers) for place in range(1, len(layers) + 1)])[:, None]
    agrees = hard[None] + 0.3 * draw.random((len(layers), tokens)) < ease + 0.15
    confidence = np.clip(ease - 0.5 * hard[None] + 0.4 * agrees + 0.2 * draw.random(agrees.shape), 0, 1)
    starts = draw.random(tokens) < 0.02
    starts[0] = True
    return Records(layers, confidence.astype(np.float32), agrees, starts)


def test_threshold_mode_by_hand() -> None:
    taken = records((4,), [[0.9, 0.9, 0.1, 0.95]], [[1, 0, 1, 1]])
    found = threshold_forecast(taken, TIMES, [4], 0.9)
    # Four tokens run 4 layers and ask the exit; the third takes the first two along, through 6 layers, to the head.
    assert found.seconds == pytest.approx((4 * 4 + 4 * 2.5 + 6 + 2) / 4)
    assert found.agreement == 0.75 and found.early == 0.75
    assert found.speedup == pytest.approx(12 / found.seconds)
    nothing = threshold_forecast(taken, TIMES, [4], 1.01)
    assert nothing.seconds == pytest.approx(12 + 2.5) and nothing.agreement == 1.0 and nothing.early == 0.0


def test_a_gate_saves_the_head_of_a_token_that_stays() -> None:
    taken = records((4,), [[0.9, 0.9, 0.1, 0.95]], [[1, 0, 1, 1]])
    found = threshold_forecast(taken, TIMES, [4], 0.9, gated=True)
    # As by hand above, but each token runs one head, here or at the end.
    assert found.seconds == pytest.approx((4 * 4 + 4 * 0.5 + 6 + 4 * 2) / 4)
    assert found.gated and (found.agreement, found.early) == (0.75, 0.75)
    stays = threshold_forecast(taken, TIMES, [4], 1.01, gated=True)
    assert stays.seconds == pytest.approx(12 + 0.5)


def test_the_mlp_that_a_body_replaces_is_not_run_twice() -> None:
    taken = records((4,), [[0.9, 0.1]], [[1, 1]])
    skipped = DecodeTimes(10, TIMES.layer, TIMES.head, TIMES.body, skipped=True)
    assert skipped.depth(4) == 3.5 and TIMES.depth(4) == 4
    found = threshold_forecast(taken, skipped, [4], 0.9)
    assert found.seconds == pytest.approx((2 * 3.5 + 2 * 2.5 + 6.5 + 2) / 2)


def test_every_sixteenth_of_confident_tokens_runs_all_layers_without_asking() -> None:
    taken = records((5,), [[1.0] * 32], [[0] * 32])
    found = threshold_forecast(taken, TIMES, [5], 0.9)
    assert found.early == 30 / 32 and found.agreement == 2 / 32
    assert found.seconds == pytest.approx((32 * 5 + 30 * 2.5 + 2 * 5 + 2 * 2) / 32)


def test_speculative_mode_by_hand() -> None:
    #       round 1: 2 accepted; 2: rejected at once; 3: 1 accepted, then rejected
    taken = records((3,), [[0.5] * 6], [[1, 1, 1, 0, 1, 0]])
    found = speculative_forecast(taken, TIMES, 3, 2)
    assert found.tokens_per_round == 2.0
    assert found.seconds == pytest.approx((3 * 3 + 2 * 2.5 + 7 + 2) / 2)
    assert found.agreement == 1.0 and found.draft_length == 2


def replayed(
    taken: Records, times: DecodeTimes, exits: list[int], threshold: float, gated: bool
) -> tuple[float, float]:
    """Seconds per token and agreement of threshold mode, token by token."""
    waiting = [0] * len(exits)
    depths = [*map(times.depth, exits), times.num_layers]
    seconds, equal, early = 0.0, 0, 0

    def layers(count: float, tokens: int) -> float:
        return count * float(np.interp(tokens, SIZES, [times.layer[size] for size in SIZES]))

    for token in range(len(taken.starts)):
        tokens, before, forced = 1, 0.0, early == 15 and confident(taken, exits, threshold, token)
        for place, layer in enumerate(exits):
            seconds += layers(depths[place] - before, tokens)
            before = depths[place]
            row = taken.layers.index(layer)
            if not forced:
                seconds += times.body[1] + (0.0 if gated else times.head[1])
                if taken.confidence[row, token] >= np.float32(threshold):
                    seconds += times.head[1] if gated else 0.0
                    waiting[place] += tokens
                    early, equal = early + 1, equal + int(taken.agrees[row, token])
                    break
            tokens, waiting[place] = tokens + waiting[place], 0
        else:
            seconds += layers(depths[-1] - before, tokens) + times.head[1]
            early, equal = 0, equal + 1
    return seconds / len(taken.starts), equal / len(taken.starts)


def confident(taken: Records, exits: list[int], threshold: float, token: int) -> bool:
    return any(taken.confidence[taken.layers.index(layer), token] >= np.float32(threshold) for layer in exits)


@pytest.mark.parametrize("exits", [[2], [9], [2, 6], [4, 6, 9]])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("gated", [False, True])
def test_threshold_mode_equals_a_replay(exits: list[int], threshold: float, gated: bool) -> None:
    taken = random_records((2, 4, 6, 9), 400, seed=1)
    found = threshold_forecast(taken, RISING, exits, threshold, gated=gated)
    assert (found.seconds, found.agreement) == pytest.approx(replayed(taken, RISING, exits, threshold, gated))


@pytest.mark.parametrize("length", [1, 3, 7])
def test_speculative_mode_equals_a_replay(length: int) -> None:
    taken = random_records((4, 9), 400, seed=2)
    rounds = token = 0
    while token < len(taken.starts):
        rounds, proposals = rounds + 1, 0
        while proposals < length and taken.agrees[1, token]:
            token, proposals = token + 1, proposals + 1
            if token == len(taken.starts) or taken.starts[token]:
                break
        else:
            token += 1  # the final exit's own
    found = speculative_forecast(taken, RISING, 9, length)
    assert found.tokens_per_round == pytest.approx(len(taken.starts) / rounds)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_set_is_the_best_of_all(seed: int) -> None:
    taken = random_records((2, 4, 6, 8, 9, 10), 600, seed=seed)
    sets = [set_ for size in range(1, MOST_EXITS + 1) for set_ in itertools.combinations(taken.layers, size)]
    for agreement, found in zip((0.97, 0.9), best_threshold(taken, RISING, (0.97, 0.9)), strict=True):
        all_ = (threshold_forecast(taken, RISING, set_, threshold) for set_ in sets for threshold in THRESHOLDS)
        best = max(each.speedup for each in all_ if each.agreement >= agreement)
        assert found.speedup == pytest.approx(max(best, 1.0)) and found.agreement >= agreement
        assert found.speedup > 1 or agreement == 0.97


def test_calibrated_confidence_is_the_share_that_agrees() -> None:
    taken = random_records((2, 9), 400, seed=3)
    found = calibrated(taken)
    assert found.confidence.mean(axis=1) == pytest.approx(taken.agrees.mean(axis=1))
    order = np.argsort(taken.confidence[1])
    assert found.confidence[1][order[:20]] == pytest.approx(taken.agrees[1][order[:20]].mean())
    assert calibrated(records((2,), [[0.4]], [[1]])).confidence.tolist() == [[1.0]]


def test_exits_that_never_agree_lose_to_full_mode() -> None:
    taken = records((2, 4), [[0.9] * 50, [0.9] * 50], [[0] * 50, [0] * 50])
    (found,) = best_threshold(taken, TIMES, (0.9,))
    assert found.exits == () and found.speedup == 1.0
    assert best_speculative(taken, TIMES).speedup < 1


def test_the_best_draft() -> None:
    taken = records((2, 4), [[0.9] * 60, [0.9] * 60], [[1, 0] * 30, [1, 1, 1, 1, 1, 0] * 10])
    found = best_speculative(taken, TIMES)
    # Exit 4 costs more, but its drafts of five are always accepted: 6 tokens in 6 x 4 + 5 x 2.5 + 6 + 2.
    assert (found.exits, found.draft_length, found.tokens_per_round) == ((4,), 5, 6.0)
    assert found.speedup == pytest.approx(6 * 12 / 44.5)


def test_growing_stops_where_more_exits_are_slower() -> None:
    speed = {(1,): 1.0, (2,): 1.2, (3,): 1.1, (1, 2): 1.15, (1, 3): 1.5, (2, 3): 1.1, (1, 2, 3): 1.4}
    asked = []

    def fastest(exits: tuple[int, ...]) -> Forecast:
        asked.append(exits)
        return Forecast(exits, 1.0, 1.0, speed[exits])

    assert grow((1, 2, 3), fastest).exits == (1, 3)  # not a set with the best single exit
    assert (1, 2, 3) in asked
