"""What ranks tell each other comes back as it was, through JSON."""

from __future__ import annotations

import json
from typing import Any

from megatron_ee.inference.heads import Answer, Ask, LogProbs, single
from megatron_ee.inference.messages import (
    pack_answers,
    pack_chain,
    pack_settings,
    unpack_answers,
    unpack_chain,
    unpack_settings,
)
from megatron_ee.inference.outputs import Settings
from megatron_ee.inference.passes import Chain, Work
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.inference.requests import Draft
from megatron_ee.inference.sampling import MAX_SEED, Sampling

DRAWN = Sampling(0.7, 40, 0.95, 0.01, 1.1, MAX_SEED)


def sent(content: Any) -> Any:
    return json.loads(json.dumps(content, allow_nan=False))


def same_types(one: Any, other: Any) -> bool:
    """Tuples stay tuples, whole numbers whole: equality alone would not tell 1 from 1.0."""
    return repr(one) == repr(other)


def test_chains() -> None:
    chains = [
        Chain(0, 3, (Work(1, 7, (5, 6, 7)), Work(2, 1, (9,), Ask("emit", 1)))),
        Chain(3, 6, (Work(4, 9),), sends=True),
        Chain(
            2,
            6,
            (
                Work(1, 9, (), Ask("verify", 6, DRAWN, proposals=(1, 2, 3), seen=(5, 6, 1), logprobs=4)),
                Work(2, 3, (), Ask("leave", 3, measure="entropy", threshold=single(0.1))),
                Work(3, 3, (), Ask("draft", 3, DRAWN)),
            ),
        ),
    ]
    for chain in chains:
        received = unpack_chain(sent(pack_chain(chain)))
        assert received == chain and same_types(received, chain) and hash(received) == hash(chain)


def test_answers() -> None:
    answers = [
        Answer((3,), (0.1,)),
        Answer(),
        Answer(finite=False),
        Answer((1, 2), (single(0.3), 1.0), (LogProbs(-0.25, {7: -0.25, 11: -3.5}), LogProbs(-1.0, {}))),
    ]
    received = unpack_answers(sent(pack_answers(answers)))
    assert received == answers and same_types(received, answers)
    assert unpack_answers(sent(pack_answers([]))) == []


def test_settings() -> None:
    common = {"request": 3, "sample": 1, "prompt": (5, 6), "max_tokens": 9, "limit": 11}
    for settings in (
        Settings(
            mode="threshold",
            policy=ExitPolicy(0.1, {2: 0.5, 11: 1.5}, "margin", 3, 4),
            draft=Draft(),
            exits=(2, 11),
            drafting=(2,),
            sampling=DRAWN,
            ends=frozenset([7, 3]),
            eos=frozenset([3]),
            logprobs=0,
            follow=(1, 2, 3),
            **common,
        ),
        Settings(
            mode="speculative",
            policy=ExitPolicy(),
            draft=Draft(2, 0),
            exits=(),
            drafting=(),
            sampling=Sampling(),
            **common,
        ),
    ):
        received = unpack_settings(sent(pack_settings(settings)))
        assert received == settings
        for name in ("prompt", "exits", "drafting", "follow", "policy", "draft", "sampling", "logprobs"):
            assert same_types(getattr(received, name), getattr(settings, name))
