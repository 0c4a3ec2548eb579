"""Quality sums: small cases worked out by hand, and a plain numpy reference on random ones."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.errors import DataError
from megatron_ee.model.metrics import FinalStats, QualityAccumulator, TokenStats
from megatron_ee.model.quality import Quality


def stats(loss: list[float], confidence: list[float], top1: list[int]) -> TokenStats:
    return TokenStats(torch.tensor(loss), torch.tensor(confidence), torch.tensor(top1))


def everything(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, dtype=torch.bool)


# Four tokens, labels 1 2 3 4; the final exit says 1 2 3 9.
LABELS = torch.tensor([1, 2, 3, 4])
FINAL = FinalStats(torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([1, 2, 3, 9]))
FIRST = stats([2.0, 2.0, 2.0, 6.0], [0.9, 0.3, 0.8, 0.6], [1, 7, 8, 9])
SECOND = stats([1.0, 2.0, 1.0, 4.0], [0.95, 0.6, 0.4, 0.7], [1, 2, 3, 4])


def by_hand(body_layers: list[int] | None = None, thresholds: tuple[float, ...] = (0.5, 0.75, 1.5)) -> Quality:
    accumulator = QualityAccumulator((2, 4), 8, thresholds, bins=2, body_layers=body_layers)
    accumulator.update([FIRST, SECOND], FINAL, LABELS, everything(4))
    return accumulator.result()


def test_means_per_exit() -> None:
    quality = by_hand()
    first, second = quality.exits
    assert (quality.tokens, quality.num_layers) == (4, 8)
    assert (quality.final_loss, quality.final_accuracy) == (2.0, 0.75)
    assert quality.final_perplexity == pytest.approx(math.exp(2))
    assert (first.layer, first.loss, first.accuracy, first.agreement) == (2, 3.0, 0.25, 0.5)
    assert (second.layer, second.loss, second.accuracy, second.agreement) == (4, 2.0, 1.0, 0.75)
    assert first.mean_confidence == pytest.approx(0.65)
    assert first.perplexity == pytest.approx(math.exp(3))


def test_calibration_by_hand() -> None:
    first, second = by_hand().exits
    # Lower half: 0.3 (wrong, disagrees). Upper: 0.9 (right, agrees), 0.8 (wrong, disagrees), 0.6 (wrong, agrees).
    assert first.ece == pytest.approx(1 / 4 * 0.3 + 3 / 4 * abs(2.3 / 3 - 1 / 3))
    assert first.ece_agreement == pytest.approx(1 / 4 * 0.3 + 3 / 4 * abs(2.3 / 3 - 2 / 3))
    lower, upper = first.bins
    assert (lower.lower, lower.upper, lower.tokens, upper.lower, upper.upper, upper.tokens) == (0, 0.5, 1, 0.5, 1, 3)
    assert (lower.accuracy, lower.agreement) == (0.0, 0.0)
    assert (upper.accuracy, upper.agreement) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert second.ece == pytest.approx(1 / 4 * 0.6 + 3 / 4 * (1 - 2.25 / 3))


def test_sweep_by_hand() -> None:
    low, high, never = by_hand().sweep
    # At 0.5 tokens 0, 2 and 3 leave at the first exit and token 1 at the second.
    assert low.shares == (0.75, 0.25, 0.0)
    assert low.mean_layers == (3 * 2 + 4) / 4
    assert (low.agreement, low.accuracy) == (0.75, 0.5)  # emitted 1 2 8 9
    assert [(a.layer, a.share) for a in low.above] == [(2, 0.75), (4, 0.75)]
    assert low.above[0].agreement == pytest.approx(2 / 3)
    assert low.above[1].agreement == pytest.approx(2 / 3)
    assert low.above[1].accuracy == 1.0
    # At 0.75 tokens 0 and 2 leave at the first exit, none at the second: what it is sure of has gone.
    assert high.shares == (0.5, 0.0, 0.5)
    assert high.mean_layers == (2 * 2 + 2 * 8) / 4
    assert (high.agreement, high.accuracy) == (0.75, 0.5)  # emitted 1 2 8 9
    assert high.above[1].share == 0.25
    # Above 1 nothing leaves, and what is emitted is the final exit's.
    assert never.shares == (0.0, 0.0, 1.0)
    assert (never.mean_layers, never.agreement, never.accuracy) == (8.0, 1.0, 0.75)
    assert math.isnan(never.above[0].agreement)


def test_a_layer_body_is_run_by_every_token_that_reaches_it() -> None:
    low, high, never = by_hand(body_layers=[0, 1]).sweep
    assert low.mean_layers == (3 * 2 + 5) / 4
    assert high.mean_layers == (2 * 2 + 2 * 9) / 4
    assert never.mean_layers == 9.0
    low, _, never = by_hand(body_layers=[1, 1]).sweep
    assert (low.mean_layers, never.mean_layers) == ((3 * 3 + 6) / 4, 10.0)


def test_confidence_equal_to_the_threshold_leaves() -> None:
    """0.9 in float32 is below 0.9 in float64; the question is asked in float32, as a decoder asks it."""
    assert by_hand(thresholds=(0.9,)).sweep[0].shares == (0.25, 0.25 * 0, 0.75)
    sure = QualityAccumulator((1,), 2, (1.0,))
    sure.update([stats([0.0], [1.0], [1])], FinalStats(torch.zeros(1), torch.tensor([1])), LABELS[:1], everything(1))
    assert sure.result().sweep[0].shares == (1.0, 0.0)


def test_masked_tokens_do_not_count() -> None:
    mask = torch.tensor([True, True, False, False])
    accumulator = QualityAccumulator((2, 4), 8, (0.5,))
    labels = torch.where(mask, LABELS, -100)
    broken = TokenStats(torch.where(mask, FIRST.loss, torch.nan), FIRST.confidence, FIRST.top1)
    accumulator.update([broken, SECOND], FINAL, labels, mask)
    quality = accumulator.result()
    assert (quality.tokens, quality.final_loss, quality.exits[0].loss) == (2, 1.0, 2.0)
    assert quality.sweep[0].shares == (0.5, 0.5, 0.0)


def test_no_unmasked_token_is_an_error() -> None:
    accumulator = QualityAccumulator((2, 4), 8, (0.5,))
    accumulator.update([FIRST, SECOND], FINAL, LABELS, torch.zeros(4, dtype=torch.bool))
    with pytest.raises(DataError, match="no unmasked token"):
        accumulator.result()


def random_case(seed: int, tokens: int, exits: int) -> tuple[list[TokenStats], FinalStats, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> torch.Tensor:
        return torch.randint(3, (tokens,), generator=generator)

    def losses() -> torch.Tensor:
        return torch.rand(tokens, generator=generator) * 10

    per_exit = [TokenStats(losses(), torch.rand(tokens, generator=generator), ids()) for _ in range(exits)]
    mask = torch.rand(tokens, generator=generator) < 0.8
    mask[0] = True
    return per_exit, FinalStats(losses(), ids()), ids(), mask


def reference(
    exits: list[TokenStats], final: FinalStats, labels: np.ndarray, layers: list[int], depth: int, threshold: float
) -> dict[str, float | list[float]]:
    """One token after the other, as a decoder would go."""
    left = [0] * (len(layers) + 1)
    run = agree = right = 0
    for token, label in enumerate(labels):
        where = len(layers)
        emitted = int(final.top1[token])
        for index, exit_ in enumerate(exits):
            if float(exit_.confidence[token]) >= np.float32(threshold):
                where, emitted = index, int(exit_.top1[token])
                break
        left[where] += 1
        run += [*layers, depth][where]
        agree += emitted == int(final.top1[token])
        right += emitted == label
    count = len(labels)
    shares = [number / count for number in left]
    return {"shares": shares, "mean_layers": run / count, "agreement": agree / count, "accuracy": right / count}


def ece_reference(confidence: np.ndarray, hit: np.ndarray, bins: int) -> float:
    edges = np.linspace(0, 1, bins + 1)
    total = 0.0
    for lower, upper in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > lower) & (confidence <= upper)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    return total


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 60), exits=st.integers(0, 4), threshold=st.floats(0, 1.2))
def test_equals_a_plain_reference(seed: int, tokens: int, exits: int, threshold: float) -> None:
    per_exit, final, labels, mask = random_case(seed, tokens, exits)
    layers = list(range(1, 2 * exits, 2))
    accumulator = QualityAccumulator(layers, 9, (threshold,), bins=10)
    accumulator.update(per_exit, final, labels, mask)
    quality = accumulator.result()

    kept = [TokenStats(e.loss[mask], e.confidence[mask], e.top1[mask]) for e in per_exit]
    kept_final, kept_labels = FinalStats(final.loss[mask], final.top1[mask]), labels[mask].numpy()
    expected = reference(kept, kept_final, kept_labels, layers, 9, threshold)
    point = quality.sweep[0]
    assert list(point.shares) == pytest.approx(expected["shares"])
    assert sum(point.shares) == pytest.approx(1)
    for name in ("mean_layers", "agreement", "accuracy"):
        assert getattr(point, name) == pytest.approx(expected[name]), name
    for exit_, given_ in zip(quality.exits, kept, strict=True):
        confidence = given_.confidence.double().numpy()
        right, agree = given_.top1.numpy() == kept_labels, (given_.top1 == kept_final.top1).numpy()
        assert exit_.loss == pytest.approx(given_.loss.double().mean().item(), rel=1e-12)
        assert exit_.ece == pytest.approx(ece_reference(confidence, right, 10), abs=1e-12)
        assert exit_.ece_agreement == pytest.approx(ece_reference(confidence, agree, 10), abs=1e-12)
        assert sum(bin_.tokens for bin_ in exit_.bins) == len(kept_labels)


def test_the_split_into_microbatches_and_ranks_does_not_matter() -> None:
    per_exit, final, labels, mask = random_case(3, 200, 3)

    def part(rows: slice) -> QualityAccumulator:
        accumulator = QualityAccumulator((1, 2, 3), 4, (0.3, 0.7))
        exits = [TokenStats(e.loss[rows], e.confidence[rows], e.top1[rows]) for e in per_exit]
        accumulator.update(exits, FinalStats(final.loss[rows], final.top1[rows]), labels[rows], mask[rows])
        return accumulator

    whole = part(slice(None))
    merged, by_sums = part(slice(0, 13)), part(slice(0, 13))
    for rows in (slice(13, 90), slice(90, 200)):
        merged.merge(part(rows))
        by_sums.sums += part(rows).sums  # what an all-reduce does
    assert merged.result() == by_sums.result()
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-13, atol=0)
    counts = whole.sums == whole.sums.round()
    assert torch.equal(merged.sums[counts], whole.sums[counts])
    with pytest.raises(ValueError, match="cannot merge"):
        merged.merge(QualityAccumulator((1, 2), 4, (0.3, 0.7)))


def test_json_round_trip() -> None:
    quality = by_hand()
    text = json.dumps(quality.to_dict(), allow_nan=False)  # the empty bin's and threshold's means are no numbers
    assert json.loads(text)["sweep"][2]["above"][0]["agreement"] is None
    again = Quality.from_dict(json.loads(text) | {"unknown": 1})
    assert again.to_dict() == quality.to_dict()
    assert again.exits[0].perplexity == quality.exits[0].perplexity
    assert isinstance(again.sweep[0].shares, tuple)


def test_a_diverged_exit_is_still_json() -> None:
    accumulator = QualityAccumulator((1,), 2, ())
    exit_ = stats([1e4, math.nan], [0.5, 0.5], [0, 0])
    accumulator.update([exit_], FinalStats(torch.tensor([1e4, 1e4]), torch.zeros(2)), LABELS[:2], everything(2))
    data = accumulator.result().to_dict()
    assert (data["final_loss"], data["final_perplexity"]) == (1e4, None)
    assert (data["exits"][0]["loss"], data["exits"][0]["perplexity"]) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 2), 4, ()), "exit_layers"),
        (((3, 2), 4, ()), "exit_layers"),
        (((0, 2), 4, ()), "exit_layers"),
        (((2, 5), 4, ()), "exit_layers"),
        (((2, 3), 4, (), 0), "bins"),
        (((2, 3), 4, (), 15, (1,)), "body_layers"),
    ],
)
def test_settings_that_do_not_fit(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QualityAccumulator(*arguments)


def test_shapes_that_do_not_fit() -> None:
    accumulator = QualityAccumulator((2, 4), 8, (0.5,))
    with pytest.raises(ValueError, match="expected 2 exits"):
        accumulator.update([FIRST], FINAL, LABELS, everything(4))
    with pytest.raises(ValueError, match="must be"):
        accumulator.update([FIRST, SECOND], FINAL, LABELS, everything(3))


def test_a_bin_has_its_upper_edge_and_not_its_lower_one() -> None:
    below, above, over = (
        float(np.nextafter(np.float32(of), np.float32(to))) for of, to in ((0.5, 0), (0.5, 1), (1, 2))
    )
    confidence = torch.tensor([0.0, 0.25, below, 0.5, above, 0.75, 1.0, over])
    tokens = torch.zeros(8, dtype=torch.int64)
    accumulator = QualityAccumulator((1,), 4, (), bins=4)
    accumulator.update(
        [TokenStats(torch.ones(8), confidence, tokens)], FinalStats(torch.ones(8), tokens), tokens, everything(8)
    )
    bins = accumulator.result().exits[0].bins
    assert [(bin_.lower, bin_.upper, bin_.tokens) for bin_ in bins] == [
        (0.0, 0.25, 2),  # 0 has no bin below it
        (0.25, 0.5, 2),
        (0.5, 0.75, 2),
        (0.75, 1.0, 2),  # rounding may lift a probability above 1
    ]
    assert bins[1].confidence == pytest.approx((below + 0.5) / 2, abs=1e-12)
