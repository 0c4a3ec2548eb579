"""Candidate settings: what full mode's answers, forced at each exit, say about them."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ee.evaluation.calibration.candidates import ForcedAnswer, candidate_settings, fit_scaling, threshold

LAYERS, NUM_LAYERS = (4, 8), 12


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def draw_forced(count: int, tokens: int = 30, seed: int = 0) -> list[ForcedAnswer]:
    """Two exits: the first is overconfident, with temperature 3 and offset -1, the second is right as it says."""
    source = np.random.default_rng(seed)
    answers = []
    for _ in range(count):
        logits = source.normal(2.0, 3.0, (2, tokens))
        chances = sigmoid(np.stack((logits[0] / 3 - 1, logits[1])))
        answers.append(ForcedAnswer(sigmoid(logits), source.random((2, tokens)) < chances))
    return answers


def test_temperature_and_offset_are_found() -> None:
    scalings, _ = candidate_settings(draw_forced(400), LAYERS, NUM_LAYERS, 12, 1.0, 1.0)
    assert [each.layer for each in scalings] == list(LAYERS)
    assert scalings[0].temperature == pytest.approx(3, rel=0.1) and scalings[0].offset == pytest.approx(-1, abs=0.15)
    assert scalings[1].temperature == pytest.approx(1, rel=0.1) and scalings[1].offset == pytest.approx(0, abs=0.15)
    assert scalings[0].tokens == 400 * 30 and 0.3 < scalings[0].agreement < scalings[1].agreement < 0.9
    # At its threshold an exit is right as often as the level says.
    level = np.log(0.8 / 0.2)
    assert sigmoid(np.log(0.8 / 0.2)) == pytest.approx(0.8)
    raw = threshold(scalings[0], level)
    assert sigmoid(np.log(raw / (1 - raw)) / 3 - 1) == pytest.approx(0.8, abs=0.03)


def test_the_members_go_from_safe_to_fast_and_predict_what_they_skip() -> None:
    answers = draw_forced(60)
    _, candidates = candidate_settings(answers, LAYERS, NUM_LAYERS, 8, 1.0, 1.0)
    assert 4 <= len(candidates) <= 8
    for name in ("differing", "skipped"):
        values = [getattr(each, name) for each in candidates]
        assert values == sorted(values)
    assert [each.level for each in candidates] == sorted((each.level for each in candidates), reverse=True)
    candidate = candidates[len(candidates) // 2]
    differing = skipped = tokens = 0
    for each in answers:
        wrong = False
        for confidences, agrees in zip(each.confidences.T, each.agrees.T, strict=True):
            tokens += 1
            for layer, confidence, agreed in zip(LAYERS, confidences, agrees, strict=True):
                if confidence >= candidate.thresholds.get(layer, 2.0):
                    skipped += NUM_LAYERS - layer
                    wrong |= not agreed
                    break
        differing += wrong
    assert candidate.differing == pytest.approx(differing / len(answers))
    assert candidate.skipped == pytest.approx(skipped / tokens)


def test_settings_that_are_predicted_to_differ_too_often_are_not_tested() -> None:
    answers = draw_forced(60)
    _, all_candidates = candidate_settings(answers, LAYERS, NUM_LAYERS, 8, 1.0, 1.0)
    _, candidates = candidate_settings(answers, LAYERS, NUM_LAYERS, 8, 0.2, 0.2)
    assert max(each.differing for each in candidates) <= 0.2 < max(each.differing for each in all_candidates)


def test_settings_that_are_likely_to_pass_get_half_of_the_points_where_faster_ones_are_tested_too() -> None:
    answers = draw_forced(60)
    _, likely = candidate_settings(answers, LAYERS, NUM_LAYERS, 4, 0.2, 0.2)
    _, candidates = candidate_settings(answers, LAYERS, NUM_LAYERS, 8, 0.2, 1.0)
    assert candidates[: len(likely)] == likely and len(likely) < len(candidates) <= 8
    assert all(each.differing > 0.2 for each in candidates[len(likely) :])
    skipped = [each.skipped for each in candidates]
    assert skipped == sorted(skipped)


def test_an_exit_whose_confidence_says_nothing_leaves_at_what_it_agrees_on_average_or_never() -> None:
    source = np.random.default_rng(0)
    confidences = source.random(2000)
    misleading = fit_scaling(3, confidences, source.random(2000) < 1 - confidences)
    assert misleading is not None and threshold(misleading, np.log(0.9 / 0.1)) > 1 - 1e-9
    assert fit_scaling(3, confidences[:0], confidences[:0] > 0) is None
    found = fit_scaling(3, confidences, np.ones(2000, dtype=bool))  # always right: the estimate stays finite
    assert found is not None and np.isfinite(found.offset) and threshold(found, np.log(0.99 / 0.01)) < 1e-6


def test_nothing_is_chosen_where_nothing_would_be_skipped() -> None:
    empty = ForcedAnswer(np.zeros((2, 0)), np.zeros((2, 0), dtype=bool))
    assert candidate_settings([empty], LAYERS, NUM_LAYERS, 8, 1.0, 1.0) == ([], [])
    never = ForcedAnswer(np.zeros((2, 9)), np.zeros((2, 9), dtype=bool))
    assert candidate_settings([never, empty], LAYERS, NUM_LAYERS, 8, 1.0, 1.0) == ([], [])
