"""Distributions as transformers has them, draws that never leave them, and speculation that keeps them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.validation import validated
from megatron_ee.errors import ConfigError
from megatron_ee.inference import sampling as batched
from megatron_ee.inference.sampling import MAX_SEED, Proposals, Sampling, uniform
from megatron_ee.testing.one_row import draw, penalised, probabilities, verify

BELOW_ONE = 1 - 2.0**-53  # the largest that uniform gives


def random_logits(size: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def chi_square(counts: Counter, expected: dict[Any, float], total: int) -> tuple[float, float]:
    """The statistic, and what it exceeds once in 10,000 times (Wilson and Hilferty's approximation)."""
    assert set(counts) <= {outcome for outcome, p in expected.items() if p > 0}
    possible = {outcome: p * total for outcome, p in expected.items() if p > 0}
    statistic = sum((counts[outcome] - mean) ** 2 / mean for outcome, mean in possible.items())
    spread = 2 / (9 * max(len(possible) - 1, 1))
    return statistic, (len(possible) - 1) * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


# -- Sampling


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1, "top_p": 1, "min_p": 0, "repetition_penalty": 2},  # whole numbers are numbers
        {"temperature": 1e-6, "top_k": 10**12, "top_p": 1e-9, "min_p": 1.0, "seed": MAX_SEED},
        {"temperature": 1e6, "repetition_penalty": 1e-3},
    ],
)
def test_what_is_allowed_gives_distributions(fields: dict[str, Any]) -> None:
    sampling = Sampling(**fields)
    logits = penalised(torch.tensor([-40.0, 30.0, -torch.inf, 30.5, 0.0]), [0, 1, 3], sampling.repetition_penalty)
    p = probabilities(logits, sampling)
    assert p.isfinite().all() and p[2] == 0
    assert p.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("bad", [True, None, "1", [1.0], math.nan, math.inf, -math.inf, 1 + 0j])
@pytest.mark.parametrize("field", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"])
def test_refuses_what_is_no_number(field: str, bad: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: must be (a whole number|a number|a finite number), not "):
        validated(Sampling, {field: bad})


@pytest.mark.parametrize(
    "field, bad",
    [
        *[("temperature", value) for value in (-0.1, 1e-7, 1e7, -1)],
        *[("top_k", value) for value in (-1, 1.0, 0.0)],
        *[("top_p", value) for value in (0, -0.5, 1.0001)],
        *[("min_p", value) for value in (-0.01, 1.01)],
        *[("repetition_penalty", value) for value in (0, -1.0, 1e-4, 1e4)],
        *[("seed", value) for value in (-1, MAX_SEED + 1, 1.5)],
    ],
)
def test_refuses_ranges(field: str, bad: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: must ") as error:
        validated(Sampling, {field: bad})
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"temperature": 10**400}, {"seed": 10**4000}])
def test_refuses_numbers_beyond_floats(fields: dict[str, int]) -> None:
    [name] = fields
    with pytest.raises(ConfigError, match=f"^{name}: must be ") as error:
        validated(Sampling, fields)
    assert len(str(error.value)) < 200


def test_greedy_is_temperature_zero() -> None:
    assert Sampling().greedy and Sampling(temperature=0, top_k=5).greedy
    assert not Sampling(temperature=1e-6).greedy


# -- penalised


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_penalised_as_transformers(size: int, penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(size, size)
    logits[0] = 0.0
    logits[-1] = -torch.inf
    seen = [0, size - 1, size // 2, size // 2, size // 3]
    before = logits.clone()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None].clone())[0]
    for collection in (seen, set(seen), tuple(seen)):
        assert torch.equal(penalised(logits, collection, penalty), expected)
    assert torch.equal(logits, before)
    assert size == 1 or not torch.equal(expected, logits)


def test_no_penalty_gives_the_input_itself() -> None:
    logits = random_logits(5, 0)
    assert batched.penalised(logits[None], [[1, 2]], [1.0]).data_ptr() == logits.data_ptr()
    assert torch.equal(penalised(logits, [], 1.5), logits)


# -- probabilities


def transformers_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What transformers' ``generate`` would sample from, with its own list of warpers."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    class Model(GenerationMixin):
        def __init__(self) -> None:  # only what the method below reads
            self.config = None

    config = GenerationConfig(
        do_sample=True,
        temperature=float(sampling.temperature),
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p if sampling.min_p > 0 else None,
    )
    warpers = Model()._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0].softmax(-1)


GRID = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.3, 1.0, 1.7), (0, 1, 3, 50), (1.0, 0.95, 0.5, 0.01), (0.0, 0.05, 0.6, 1.0)
    )
]


@pytest.mark.parametrize("kind", ["random", "flat", "sharp", "ties", "two values", "padded"])
@pytest.mark.parametrize("size", [1, 2, 5, 300, 5000])
def test_probabilities_as_transformers(size: int, kind: str) -> None:
    logits = random_logits(size, size, {"flat": 0.1, "sharp": 20.0}.get(kind, 3.0))
    if kind == "ties":
        logits = logits.round()
    elif kind == "two values":
        logits = (logits > 0).float()
    elif kind == "padded":
        logits[size // 2 + 1 :] = -torch.inf
    for sampling in GRID:
        actual, expected = probabilities(logits, sampling), transformers_probabilities(logits, sampling)
        assert actual.dtype == torch.float32
        differ = ((actual > 0) != (expected > 0)).nonzero().squeeze(1)
        if len(differ):
            # At the border of top-p transformers keeps any of several equals, and sums rounded otherwise may put it one
            # token further, never more.
            assert sampling.top_p < 1 and len(logits[differ].unique()) == 1, (sampling, differ)
            assert abs(int((actual > 0).sum()) - int((expected > 0).sum())) <= 1, sampling
            actual, expected = actual.sort().values, expected.sort().values
            assert (actual - expected).abs().max() < 1e-3
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_borders_are_those_of_transformers_and_not_only_near_them() -> None:
    """The allowance above is used seldom: without a tie at the border the tokens kept are the same."""
    grid = [s for s in GRID if s.top_p < 1]
    pairs = [(random_logits(2000, seed), s) for seed in range(4) for s in grid]
    same = sum(
        torch.equal(probabilities(logits, s) > 0, transformers_probabilities(logits, s) > 0) for logits, s in pairs
    )
    assert same >= 0.99 * len(pairs)


def test_order_of_the_restrictions_matters_and_is_top_k_top_p_min_p() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two best, 0.4 / 0.7 = 0.57 is enough for top-p; of all four it would not be.
    assert probabilities(logits, Sampling(temperature=1.0, top_k=2, top_p=0.55)).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(
        probabilities(logits, Sampling(temperature=1.0, top_p=0.55)),
        torch.tensor([4 / 7, 3 / 7, 0.0, 0.0]),
        rtol=1e-5,
        atol=0,
    )
    torch.testing.assert_close(
        probabilities(logits, Sampling(temperature=2.0)),
        torch.tensor([0.4, 0.3, 0.2, 0.1]).sqrt().div(1.9436),
        rtol=1e-3,
        atol=0,
    )
    assert (probabilities(logits, Sampling(temperature=1.0, min_p=0.6)) > 0).tolist() == [True, True, False, False]


def test_top_p_keeps_the_lowest_of_equals() -> None:
    logits = torch.tensor([0.0, 2.0, 2.0, 2.0, 2.0, -torch.inf])
    assert probabilities(logits, Sampling(temperature=1.0, top_p=1e-9)).tolist() == [0, 1, 0, 0, 0, 0]
    assert probabilities(logits, Sampling(temperature=1.0, top_p=0.4)).tolist() == [0, 0.5, 0.5, 0, 0, 0]
    p = probabilities(torch.zeros(1000), Sampling(temperature=1.0, top_p=0.5))
    assert p[:499].min() > 0 and p[502:].max() == 0


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([-1.0, 2.0, 0.0, 2.0, -torch.inf])
    assert probabilities(logits, Sampling(top_k=3, top_p=0.5)).tolist() == [0, 1, 0, 0, 0]
    assert probabilities(torch.zeros(1), Sampling()).tolist() == [1]


def test_logits_are_not_written_into() -> None:
    logits = random_logits(50, 1)
    before = logits.clone()
    for sampling in (Sampling(), Sampling(temperature=0.7, top_k=5, top_p=0.8, min_p=0.1)):
        probabilities(logits, sampling)
    assert torch.equal(logits, before)


# -- rows together


MIXED = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=3),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=0.4, top_k=40, top_p=0.9, min_p=0.1),
    Sampling(),
    Sampling(temperature=2.0, top_k=10**12, min_p=0.5),
]


@pytest.mark.parametrize("at_once", [1, 4, 32])
def test_a_batch_gives_what_its_sequences_give_alone(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "SORTED_ROWS", at_once)
    logits = torch.stack([random_logits(60, seed) for seed in range(len(MIXED))])
    seen = [[3, 3, 5], [], [7], [0, 59], [1], [2]]
    penalties = [1.0, 2.0, 1.5, 0.5, 3.0, 1.0]
    after = batched.penalised(logits, seen, penalties)
    found = batched.probabilities(after, MIXED)
    for row, settings_ in enumerate(MIXED):
        alone = penalised(logits[row], seen[row], penalties[row])
        assert torch.equal(after[row], alone)
        torch.testing.assert_close(found[row], probabilities(alone, settings_), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [1.0, 0.05, 8.0, None])
def test_top_p_of_a_device_is_that_of_a_cpu(kind: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sorts everything, where a CPU sorts what is near the border."""
    logits = torch.stack([random_logits(3000, seed, kind or 1.0) for seed in range(4)])
    logits = logits.round() if kind is None else logits
    each = [
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=1.0),
        Sampling(temperature=0.5, top_p=0.3),
        Sampling(temperature=1.0, top_p=1e-9),
    ]
    here = batched.probabilities(logits, each)
    monkeypatch.setattr(platform, "queues_work", lambda device: True)
    monkeypatch.setattr(platform, "to_device", lambda tensor, where=None: tensor)
    there = batched.probabilities(logits, each)
    differ = ((here > 0) != (there > 0)).sum(-1)
    assert differ.max() <= 1  # sums that are rounded otherwise may put the border one token further
    torch.testing.assert_close(here[differ == 0], there[differ == 0], rtol=1e-6, atol=0)
    assert (differ == 0).sum() >= 3


def test_rounds_of_several_lengths_are_verified_together() -> None:
    p, q = (make_table(seed, PLAIN, size=8) for seed in (21, 22))
    for seed in range(60):
        proposals, targets, drafts, ends = [], [], [], []
        for count, at in ((2, 4), (0, 11), (3, 8)):
            start = sum(map(len, drafts))
            rows = q[start : start + count]
            tokens = [draw(row, uniform(seed + count, at + i, "draft")) for i, row in enumerate(rows)]
            before = sum(map(len, targets))
            targets.append(p[before : before + count + 1])
            drafts.append(rows)
            proposals.append(Proposals(tokens, seed + count, at))
            ends.append(verify(targets[-1], rows, tokens, seed + count, at))
        accepted, tokens, masses = batched.verify(torch.cat(targets), torch.cat(drafts), proposals)
        for row, (count, following) in enumerate(ends):
            assert int(accepted[row]) == count and int(tokens[row, count]) == following
            assert tokens[row, :count].tolist() == list(proposals[row].tokens[:count])
            assert float(masses[row]) == pytest.approx(1, abs=1e-5) or count < len(proposals[row].tokens)


# -- uniform and draw


def test_uniform_is_the_same_everywhere() -> None:
    # Golden: a change would alter every seeded output.
    assert uniform(0, 0, "target") == 0.25972057524252135
    assert uniform(MAX_SEED, 17, "draft") == 0.7048071462208934


def test_uniform_depends_on_all_it_is_given() -> None:
    arguments = [(s, p, w) for s in (0, 1, 12) for p in (0, 1, 21, 2) for w in ("target", "draft", "accept")]
    values = [uniform(*each) for each in arguments]
    assert len(set(values)) == len(values)
    assert values == [uniform(*each) for each in arguments]
    assert all(0 <= value < 1 for value in values)


def test_uniform_is_uniform_and_its_purposes_do_not_follow_each_other() -> None:
    pairs = [(uniform(5, i, "accept"), uniform(5, i, "resample")) for i in range(4000)]
    cells = Counter((int(a * 4), int(b * 4)) for a, b in pairs)
    statistic, limit = chi_square(cells, {cell: 1 / 16 for cell in itertools.product(range(4), repeat=2)}, len(pairs))
    assert statistic <= limit  # both 0 where there is one outcome


def test_draw_splits_the_unit_interval_in_order() -> None:
    p = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0])
    places = [(0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (BELOW_ONE, 3)]
    assert [draw(p, u) for u, _ in places] == [token for _, token in places]
    assert [draw(3 * p, u) for u, _ in places] == [token for _, token in places]  # any positive sum


WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(0, 1, width=32), st.sampled_from([1e-45, 1e-38, 1e-20, 1e-8])),
    min_size=1,
    max_size=40,
)
UNIFORMS = st.one_of(st.floats(0, BELOW_ONE), st.sampled_from([0.0, 5e-324, 0.5, BELOW_ONE]))


@settings(deadline=None, max_examples=300)
@given(WEIGHTS, UNIFORMS)
@example([0.0, 1e-45, 0.0], BELOW_ONE)
@example([0.0, 0.0, 1.0, 0.0], 0.0)
@example([1.0, 1e-45, 0.0], BELOW_ONE)
def test_draw_never_leaves_the_distribution(weights: list[float], u: float) -> None:
    p = torch.tensor(weights, dtype=torch.float32)
    assume(p.sum() > 0)
    token = draw(p, u)
    assert p[token] > 0
    # And it is the inverse of the cumulative distribution, to float64's rounding.
    share = u * p.double().sum().item()
    assert p[:token].double().sum().item() <= share * (1 + 1e-12) + 1e-300
    assert p[: token + 1].double().sum().item() >= share * (1 - 1e-12)


@settings(deadline=None, max_examples=100)
@given(WEIGHTS, UNIFORMS, UNIFORMS)
def test_draw_follows_u(weights: list[float], one: float, other: float) -> None:
    p = torch.tensor(weights, dtype=torch.float32)
    assume(p.sum() > 0)
    low, high = sorted((one, other))
    assert draw(p, low) <= draw(p, high)


@pytest.mark.parametrize("p", [[0.0, 0.0], [math.nan, 1.0], [0.5, math.nan], [math.inf, 1.0]])
def test_draw_refuses_what_is_no_distribution(p: list[float]) -> None:
    with pytest.raises(ValueError, match="not a distribution"):
        draw(torch.tensor(p), 0.5)


def test_draws_are_distributed_as_asked() -> None:
    p = torch.tensor([0.05, 0.0, 0.45, 0.2, 0.3])
    counts = Counter(draw(p, uniform(seed, 3, "target")) for seed in range(3000))
    statistic, limit = chi_square(counts, dict(enumerate(p.tolist())), 3000)
    assert statistic <= limit  # both 0 where there is one outcome


# -- verify


Distributions = Callable[[tuple[int, ...]], Tensor]
"""The distribution of the next token after some tokens."""


def speculate(target: Distributions, draft: Distributions, length: int, drafts: int, seed: int) -> tuple[int, ...]:
    """``length`` tokens, in rounds of up to ``drafts`` proposals each, as an engine would make them."""
    tokens: tuple[int, ...] = ()
    while len(tokens) < length:
        start, proposals, q = len(tokens), [], []
        for position in range(start, start + drafts):
            q.append(draft((*tokens, *proposals)))
            proposals.append(draw(q[-1], uniform(seed, position, "draft")))
        p = torch.stack([target((*tokens, *proposals[:count])) for count in range(drafts + 1)])
        rows = torch.stack(q) if q else p[:0]
        accepted, following = verify(p, rows, proposals, seed, start)
        tokens = (*tokens, *proposals[:accepted], following)
    return tokens[:length]


def memory(table: Tensor) -> Distributions:
    """A model that looks at the last token alone; row V of ``table`` [V+1, V] starts a text."""
    return lambda tokens: table[tokens[-1] if tokens else -1]


def joint(table: Tensor, length: int) -> dict[Any, float]:
    size = table.shape[1]
    chances = {}
    for outcome in itertools.product(range(size), repeat=length):
        rows = [size, *outcome[:-1]]
        chances[outcome] = math.prod(table[row, token].item() for row, token in zip(rows, outcome, strict=True))
    total = sum(chances.values())
    return {outcome: chance / total for outcome, chance in chances.items()}


def make_table(seed: int, sampling: Sampling, size: int = 3, scale: float = 1.5) -> Tensor:
    logits = random_logits((size + 1) * size, seed, scale).view(size + 1, size)
    return torch.stack([probabilities(row, sampling) for row in logits])


PLAIN = Sampling(temperature=1.0)
CASES = {
    "different": (make_table(1, PLAIN), make_table(2, PLAIN)),
    "opposed": (make_table(1, PLAIN, scale=3.0), make_table(1, PLAIN, scale=-3.0)),
    "equal": (make_table(3, PLAIN), make_table(3, PLAIN)),
    "top-k": (make_table(4, Sampling(temperature=1.0, top_k=2)), make_table(5, Sampling(temperature=1.0, top_k=2))),
    "top-p": (make_table(6, Sampling(temperature=1.0, top_p=0.8)), make_table(7, Sampling(temperature=1.0, top_p=0.6))),
    "greedy draft": (make_table(8, PLAIN), make_table(9, Sampling())),
    "greedy target": (make_table(8, Sampling()), make_table(9, PLAIN)),
}
TELLING = ("different", "top-p", "greedy target")


@pytest.mark.parametrize("drafts", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "case", [name if name in TELLING else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_speculation_keeps_the_targets_distribution(case: str, drafts: int) -> None:
    """Whole texts of three tokens, so that what follows a replacement and a full acceptance counts too."""
    p, q = CASES[case]
    total = 1500
    counts = Counter(speculate(memory(p), memory(q), 3, drafts, seed) for seed in range(total))
    statistic, limit = chi_square(counts, joint(p, 3), total)
    assert statistic <= limit  # both 0 where there is one outcome


def test_the_statistical_test_would_notice_a_wrong_distribution() -> None:
    p, q = CASES["different"]
    total = 1500
    drafted = Counter(speculate(memory(q), memory(q), 3, 3, seed) for seed in range(total))
    statistic, limit = chi_square(drafted, joint(p, 3), total)
    assert statistic > 2 * limit


def test_share_of_accepted_proposals_is_the_overlap() -> None:
    p, q = (table[-1:] for table in CASES["different"])
    total = 3000
    stand = 0
    for seed in range(total):
        proposal = draw(q[0], uniform(seed, 9, "draft"))
        stand += verify(torch.cat([p, p]), q, [proposal], seed, 9)[0]
    overlap = torch.minimum(p, q).sum().item()
    assert 0.2 < overlap < 0.95
    assert abs(stand / total - overlap) < 4 * math.sqrt(overlap * (1 - overlap) / total)


def test_greedy_verification_compares_tokens() -> None:
    p = torch.eye(5)[[3, 1, 4, 2]]
    for proposals, expected in (
        ([3, 1, 4], (3, 2)),
        ([3, 1, 0], (2, 4)),
        ([0, 1, 4], (0, 3)),
        ([], (0, 3)),
    ):
        q = torch.eye(5)[proposals]
        for seed in range(20):
            assert verify(p[: len(proposals) + 1], q, proposals, seed, 7) == expected


def test_equal_distributions_accept_all() -> None:
    p = make_table(11, PLAIN, size=6)
    for seed in range(200):
        tokens = [draw(row, uniform(seed, i, "draft")) for i, row in enumerate(p[:5])]
        assert verify(p[:6], p[:5], tokens, seed, 0)[0] == 5


def test_no_proposals_draws_what_full_mode_draws() -> None:
    p = make_table(12, PLAIN, size=6)
    for seed in range(50):
        token = draw(p[0], uniform(seed, 31, "target"))
        assert verify(p[:1], p[:0], [], seed, 31) == (0, token)


def test_distributions_that_differ_by_rounding_alone() -> None:
    """Whatever is left of them after subtraction, a token of the target comes out."""
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    q = torch.nextafter(p[:1], torch.ones(3)) * torch.tensor([1.0, 1.0, 0.0])
    outcomes = {verify(p, q, [0], seed, 0) for seed in range(50)}
    assert outcomes <= {(1, 1), (0, 0), (0, 1)}
    # A proposal that the target rules out, with nothing left: the target is drawn from.
    q = torch.tensor([[0.5, 0.5, 1e-7]])
    assert {verify(p, q, [2], seed, 0) for seed in range(50)} == {(0, 0), (0, 1)}


def test_acceptance_depends_on_the_position_not_on_the_round() -> None:
    p, q = make_table(13, PLAIN, size=9), make_table(14, PLAIN, size=9)
    accepted: Counter = Counter()
    for seed in range(100):
        tokens = [draw(row, uniform(seed, 40 + index, "draft")) for index, row in enumerate(q[:4])]
        count, following = verify(p[:5], q[:4], tokens, seed, 40)
        accepted[count] += 1
        if count > 0:  # what follows the first one does not depend on where the round began
            assert verify(p[1:5], q[1:4], tokens[1:], seed, 41) == (count - 1, following)
    assert all(accepted[count] > 2 for count in range(5)), accepted


@pytest.mark.gpu
def test_draws_on_a_gpu_never_leave_the_distribution() -> None:
    """A parallel scan's sums are not monotonic."""
    p = probabilities(random_logits(128256, 0), Sampling(temperature=1.0, top_k=200)).cuda()
    for u in [0.0, BELOW_ONE, *(uniform(0, i, "target") for i in range(2000))]:
        assert p[draw(p, u)] > 0
    for seed in range(200):
        token = draw(p, uniform(seed, 0, "target"))
        assert abs(p[:token].cpu().double().sum().item() - uniform(seed, 0, "target")) <= p[token].item() + 1e-6
