"""How far to draft and at which exit, on made-up times and acceptance: a simulation stands in for the model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest

from megatron_ee.inference.speculation import (
    DEFAULT_LENGTH,
    EXPLORE,
    MAX_LENGTH,
    TRIALS,
    Acceptance,
    Costs,
    Drafter,
    DraftState,
    Plan,
    bucket,
)

LAYERS, FINAL = 16, 17
EXITS = (4, 8)
HEAD = 0.5

Seconds = Callable[[int], float]
"""How much longer so many tokens take than one."""


def flat(tokens: int) -> float:
    """Whatever the number of tokens, as where weights have to be read."""
    return 1.0


def linear(tokens: int) -> float:
    """As where arithmetic takes the time: nothing is won by verifying together."""
    return float(tokens)


def drafter_of() -> Drafter:
    costs = Costs(dict.fromkeys((*EXITS, FINAL), HEAD))
    return Drafter(costs, {layer: Acceptance() for layer in EXITS})


def simulate(
    drafter: Drafter,
    agrees: dict[int, float],
    rounds: int,
    *,
    seconds: Seconds = flat,
    seed: int = 0,
    head: float = HEAD,
    exits: tuple[int, ...] = EXITS,
    **wanted: Any,
) -> list[Plan]:
    """Rounds in which proposals of each exit stand with these chances; exits are a little surer of those that do."""
    rng, plans = random.Random(seed), []
    for _ in range(rounds):
        plan = drafter.plan(exits, 1, **wanted)
        plans.append(plan)
        made: list[tuple[float, bool]] = []
        spent, chance, unsure = 0.0, 1.0, None
        while len(made) < plan.length:
            spent += plan.exit + head
            drafter.costs.observe(plan.exit, 1, plan.exit + head)
            stands = rng.random() < agrees[plan.exit]
            sure = rng.uniform(0.5, 1.0) if stands else rng.uniform(0.0, 0.7)
            chance *= drafter.acceptance[plan.exit].rate(sure)
            if plan.min_chance > 0 and chance < plan.min_chance:
                unsure = (sure, stands)
                break
            made.append((sure, stands))
        if unsure is None and plan.exit:
            spent += plan.exit  # the last proposal's own way to the exit
        spent += (LAYERS - plan.exit + HEAD) * seconds(len(made) + 1)
        accepted = next((number for number, (_, stands) in enumerate(made) if not stands), len(made))
        for number, (sure, _) in enumerate(made[: accepted + 1]):
            drafter.acceptance[plan.exit].observe(sure, number < accepted)
        if unsure is not None and accepted == len(made):
            drafter.acceptance[plan.exit].observe(*unsure)
        drafter.learn(plan, 1, len(made), accepted + 1, spent)
    return plans


def late(plans: list[Plan]) -> Counter[int]:
    """Exits of the second half."""
    return Counter(plan.exit for plan in plans[len(plans) // 2 :])


# -- costs


def test_costs_are_measured_or_estimated_from_layers() -> None:
    costs = Costs({4: 0.5, 8: 0.5, FINAL: 2.0})
    assert costs.seconds(4, 1) == 0.0  # nothing is known
    costs.observe(4, 1, 9.0)
    assert costs.seconds(4, 1) == pytest.approx(9.0)
    # The rest by layers, heads as so many of them: 9 seconds were for 4.5.
    assert costs.seconds(8, 1) == pytest.approx(17.0)
    # Of sizes not seen, the nearest counts.
    costs.observe(4, 8, 18.0)
    assert costs.seconds(8, 6) == pytest.approx(4 * 8.5)
    assert costs.seconds(8, 2) == pytest.approx(2 * 8.5)


def test_slow_first_measurements_are_replaced_and_outliers_smoothed() -> None:
    costs = Costs({4: 0.0})
    costs.observe(4, 1, 100.0)
    costs.observe(4, 1, 1.0)
    assert costs.seconds(4, 1) == pytest.approx(1.0)
    costs.observe(4, 1, 60.0)  # something else ran
    assert costs.seconds(4, 1) == pytest.approx(1.2)
    for _ in range(40):
        costs.observe(4, 1, 3.0)
    assert costs.seconds(4, 1) == pytest.approx(3.0, rel=0.01)


def test_batch_sizes_of_equal_cost_share_a_bucket() -> None:
    assert [bucket(size) for size in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17)] == [
        *(1, 2, 3, 4),
        *(6, 6, 8, 8),
        *(12, 12, 16, 16, 24),
    ]


# -- acceptance


def test_acceptance_follows_what_happens() -> None:
    acceptance = Acceptance()
    for confidence in (0.05, 0.55, 0.95):
        assert acceptance.rate(confidence) == pytest.approx(confidence, abs=0.051)  # as sure as the exit is
    for number in range(200):
        acceptance.observe(0.9, True)
        acceptance.observe(0.2, number % 4 == 0)
    assert acceptance.rate(0.9) > 0.95 and acceptance.rate(0.2) == pytest.approx(0.25, abs=0.1)
    for _ in range(150):
        acceptance.observe(0.9, False)
    assert acceptance.rate(0.9) < 0.1
    assert acceptance.rate(1.0) == acceptance.rate(0.95) and acceptance.rate(0.0) == acceptance.rate(0.05)


# -- plans


def test_an_exit_that_agrees_and_is_cheap_drafts_long() -> None:
    plans = simulate(drafter_of(), {4: 0.97, 8: 0.97}, 200)
    assert late(plans)[4] > 80
    assert plans[0] == Plan(4, DEFAULT_LENGTH), "a long draft before anything is known"
    assert {plan.length for plan in plans[2 * TRIALS :] if plan.exit} == {MAX_LENGTH}


def test_the_better_exit_is_preferred_and_found_again_when_the_text_changes() -> None:
    drafter = drafter_of()
    assert late(simulate(drafter, {4: 0.2, 8: 0.97}, 200))[8] > 80
    assert late(simulate(drafter, {4: 0.97, 8: 0.3}, 600, seed=1))[4] > 220


def test_drafting_stops_where_it_does_not_pay() -> None:
    assert late(simulate(drafter_of(), {4: 0.02, 8: 0.02}, 300))[0] > 120
    plans = simulate(drafter_of(), {4: 0.8, 8: 0.8}, 300, seconds=linear)
    assert late(plans)[0] > 100
    assert all(plan == Plan() for plan in plans if plan.exit == 0)


@pytest.mark.parametrize("agrees", [{4: 0.02, 8: 0.02}, {4: 0.95, 8: 0.1}])
def test_every_draft_exit_is_retried(agrees: dict[int, float]) -> None:
    plans = simulate(drafter_of(), agrees, 400)
    first = Counter(plan.exit for plan in plans[: 3 * TRIALS + 9])  # of some sizes there the first does not count
    assert all(first[layer] > TRIALS for layer in (0, *EXITS))
    for layer in (0, *EXITS):
        tried = [number for number, plan in enumerate(plans) if plan.exit == layer]
        assert max(b - a for a, b in zip(tried, [*tried[1:], len(plans)], strict=True)) <= (len(agrees) * EXPLORE) + 3


def test_slow_first_rounds_of_a_size_do_not_count() -> None:
    drafter = drafter_of()
    for seconds in (90.0, *[1.0] * 9):  # something is compiled first
        drafter.learn(Plan(4, MAX_LENGTH), 1, 3, 4, seconds)
    for _ in range(9):
        drafter.learn(Plan(), 1, 0, 1, 1.0)
    assert drafter.plan([4], 1).exit == 4
    slow = drafter_of()
    for _ in range(10):
        slow.learn(Plan(4, MAX_LENGTH), 1, 3, 4, 10.0)
        slow.learn(Plan(), 1, 0, 1, 1.0)
    assert slow.plan([4], 1).exit == 0


def test_a_requested_draft_exit_always_drafts() -> None:
    plans = simulate(drafter_of(), {8: 0.02}, 200, exits=(8,), may_skip=False)
    assert {plan.exit for plan in plans} == {8}


def test_a_requested_draft_length_leaves_the_exit_open() -> None:
    plans = simulate(drafter_of(), {4: 0.2, 8: 0.97}, 200, length=3)
    assert {plan.length for plan in plans} == {3} and {plan.min_chance for plan in plans} == {0.0}
    assert late(plans)[8] > 80


def test_a_proposal_must_be_worth_its_time() -> None:
    """The surer it has to be, the dearer drafting is."""
    worth = [simulate(drafter_of(), {4: 0.9}, 100, exits=(4,), head=head)[-1].min_chance for head in (HEAD, 3.0)]
    assert 0 < worth[0] < worth[1]


def test_small_batches_do_not_decide_the_drafts_of_large_ones() -> None:
    drafter = drafter_of()
    assert late(simulate(drafter, {4: 0.97, 8: 0.97}, 100))[4] > 40
    tried = []
    for _ in range(3 * TRIALS):
        tried.append(drafter.plan(EXITS, 8))
        drafter.learn(tried[-1], 8, 0, 1, 1.0)
    assert {plan.exit for plan in tried} == {0, *EXITS}


OPEN = (None, None)
EXIT, LAST = 2, 8


def drafts(state: DraftState, rounds: int, accepted: bool) -> list[bool]:
    """In which rounds a sequence drafted; its drafts are all accepted, or all rejected."""
    found = []
    for _ in range(rounds):
        state.begin_round(1, 0.0, 400)
        proposals = 0
        while proposals < state.plan_length and state.propose(5, 0.9):
            proposals += 1
        found.append(state.plan_exit > 0)
        state.set_seconds(1.0)
        state.end_round([5] * (proposals + 1) if accepted else [6])
    return found


def drafter_that_skips() -> Drafter:
    """It has learnt from others that drafts do not pay."""
    drafter = Drafter(Costs({EXIT: 1.0, LAST + 1: 1.0}), {EXIT: Acceptance()})
    for _ in range(20):
        drafter.learn(Plan(EXIT, 4), 1, 4, 1, 1.2)
        drafter.learn(Plan(), 1, 0, 1, 1.0)
    return drafter


def test_after_failed_drafts_rounds_are_skipped_for_longer_and_longer() -> None:
    drafter = drafter_that_skips()
    for _ in range(200):
        drafter.learn(Plan(EXIT, 4), 1, 4, 9, 0.1)  # so good that the drafter itself does not skip
    drafter.learn(Plan(), 1, 0, 1, 1.0)  # nor tries it for some rounds
    state = DraftState(drafter, [EXIT], OPEN, greedy=True)
    runs = [(drafted, len(list(run))) for drafted, run in groupby(drafts(state, 45, accepted=False))]
    assert runs == [(True, 4), (False, 1), (True, 1), (False, 3), (True, 1), (False, 7), (True, 1), (False, 15)] + [
        (True, 1),
        (False, 11),
    ]
    assert all(drafts(state, 10, accepted=True)[5:])


def test_a_sequence_that_backs_off_teaches_nothing_until_a_draft_is_accepted() -> None:
    drafter = drafter_that_skips()
    state = DraftState(drafter, [EXIT], OPEN, greedy=True)
    state.num_failed_rounds, state.rounds_to_skip = 9, 3
    before = deepcopy(drafter)
    assert drafts(state, 5, accepted=False) == [False] * 3 + [True, False]
    assert drafter == replace(before, acceptance=drafter.acceptance)
    state.rounds_to_skip = 0
    assert drafts(state, 1, accepted=True) == [True]
    assert drafter != replace(before, acceptance=drafter.acceptance)


def test_a_sequence_that_backs_off_tries_each_exit_in_turn() -> None:
    layers = (EXIT, EXIT + 1)
    drafter = Drafter(Costs({layer: 1.0 for layer in (*layers, LAST + 1)}), {layer: Acceptance() for layer in layers})
    state = DraftState(drafter, layers, OPEN, greedy=True)
    tried = []
    for failed in (9, 10, 11):
        state.num_failed_rounds, state.rounds_to_skip, state.plan = failed, 0, None
        state.begin_round(1, 0.0, 400)
        tried.append(state.plan_exit)
    assert tried == [EXIT + 1, EXIT, EXIT + 1]


def test_a_sequence_begins_with_drafts_whatever_others_have_shown() -> None:
    drafter = drafter_that_skips()
    assert drafter.plan([EXIT], 1) == Plan()
    assert (
        drafts(DraftState(drafter, [EXIT], OPEN, greedy=True), TRIALS + 2, accepted=False)
        == [True] * TRIALS + [False] * 2
    )
    # One whose drafts are accepted goes on with them.
    assert all(drafts(DraftState(drafter, [EXIT], OPEN, greedy=True), 9, accepted=True))
