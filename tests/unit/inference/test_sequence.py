"""One output's own decisions, without a model: what it runs next, and when it drafts."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import groupby
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.inference.heads import HeadOutput
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.inference.requests import Draft, Token
from megatron_ee.inference.sampling import Sampling
from megatron_ee.inference.sequence import Sequence, SequenceParams
from megatron_ee.inference.speculation import TRIALS, Acceptance, Costs, Drafter, Plan

IDS = st.lists(st.integers(0, 9), max_size=5)
EXIT, LAST = 2, 8


def settings_of(**fields: Any) -> SequenceParams:
    defaults: dict[str, Any] = {"mode": "full", "policy": ExitPolicy(), "draft": Draft(), "sampling": Sampling()}
    sizes = {"prompt": (1,), "exits": (EXIT,), "drafting": (EXIT,), "max_tokens": 500, "limit": 500}
    return SequenceParams(request=1, sample=0, **{**defaults, **sizes, **fields})


@given(IDS, IDS, IDS, st.booleans())
def test_ids_from_a_position_are_the_last_of_all(
    prompt: list[int], said: list[int], proposals: list[int], follows: bool
) -> None:
    given_instead = tuple(9 - token for token in said) if follows else ()
    settings = settings_of(prompt=tuple(prompt), follow=given_instead)
    output = Sequence(1, settings, tokens=[Token(token, 2, 0.5) for token in said], proposals=proposals)
    assert output.ids == [*prompt, *(given_instead or said), *proposals]
    assert len(output.ids) == output.known
    for start in range(output.known + 1):
        assert output.ids_from(start) == output.ids[start:]


def drafts(output: Sequence, rounds: int, stands: bool) -> list[bool]:
    """In which rounds it drafted; its drafts all stand, or all fall."""
    found = []
    for _ in range(rounds):
        output.begin_round(1, 0.0)
        assert output.plan is not None
        while output.drafts and output.doubt is None:
            head_input = output.head_input(EXIT, LAST + 1)
            assert head_input is not None
            output.take(HeadOutput((5,), (0.9,)), head_input, EXIT, LAST)
        found.append(output.plan.exit > 0)
        head_input = output.head_input(LAST + 1, LAST + 1)
        assert head_input is not None
        told = (*head_input.proposals, 5) if stands else (6,)
        output.spent = 1.0
        output.take(HeadOutput(told, (0.9,) * len(told)), head_input, LAST + 1, LAST)
    return found


def drafter_that_rests() -> Drafter:
    """It has learnt from others that drafts do not pay."""
    drafter = Drafter(Costs({EXIT: 1.0, LAST + 1: 1.0}), {EXIT: Acceptance()})
    for _ in range(20):
        drafter.learn(Plan(EXIT, 4), 1, 4, 1, 1.2)
        drafter.learn(Plan(), 1, 0, 1, 1.0)
    return drafter


def test_rounds_after_drafts_in_vain_are_without_one_for_longer_and_longer() -> None:
    drafter = drafter_that_rests()
    for _ in range(200):
        drafter.learn(Plan(EXIT, 4), 1, 4, 9, 0.1)  # so good that the drafter itself does not rest
    drafter.learn(Plan(), 1, 0, 1, 1.0)  # nor tries it for some rounds
    output = Sequence(1, settings_of(mode="speculative"), drafter)
    runs = [(drafted, len(list(run))) for drafted, run in groupby(drafts(output, 45, stands=False))]
    assert runs == [(True, 4), (False, 1), (True, 1), (False, 3), (True, 1), (False, 7), (True, 1), (False, 15)] + [
        (True, 1),
        (False, 11),
    ]
    assert all(drafts(output, 10, stands=True)[5:])


def test_a_row_that_rests_says_nothing_of_exits_until_a_draft_stands() -> None:
    drafter = drafter_that_rests()
    output = Sequence(1, settings_of(mode="speculative"), drafter, vain=9, rests=3)
    before = deepcopy(drafter)
    assert drafts(output, 5, stands=False) == [False] * 3 + [True, False]
    assert drafter == replace(before, acceptance=drafter.acceptance)
    output.rests = 0
    assert drafts(output, 1, stands=True) == [True]
    assert drafter != replace(before, acceptance=drafter.acceptance)


def test_a_row_that_rests_tries_each_exit_in_turn() -> None:
    layers = (EXIT, EXIT + 1)
    drafter = Drafter(Costs({layer: 1.0 for layer in (*layers, LAST + 1)}), {layer: Acceptance() for layer in layers})
    output = Sequence(1, settings_of(mode="speculative", exits=layers, drafting=layers), drafter)
    tried = []
    for vain in (9, 10, 11):
        output.vain, output.rests, output.plan = vain, 0, None
        output.begin_round(1, 0.0)
        assert output.plan is not None
        tried.append(output.plan.exit)
    assert tried == [EXIT + 1, EXIT, EXIT + 1]


def test_a_row_begins_with_drafts_whatever_became_of_others() -> None:
    drafter = drafter_that_rests()
    assert drafter.plan([EXIT], 1) == Plan()
    output = Sequence(1, settings_of(mode="speculative"), drafter)
    assert drafts(output, TRIALS + 2, stands=False) == [True] * TRIALS + [False] * 2
    # One whose drafts stand goes on with them.
    assert all(drafts(Sequence(2, settings_of(mode="speculative"), drafter), 9, stands=True))
