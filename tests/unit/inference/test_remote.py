"""What ranks tell each other comes back as it was, through JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_ee.inference.heads import HeadInput, HeadOutput, LogProbs
from megatron_ee.inference.kv_cache_manager import KVBudget, KVCacheManager
from megatron_ee.inference.passes import Pass, ScheduledSequence, StageMap
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.remote import (
    EXIT_REPLAYS,
    HEAD_OUTPUTS,
    PARAMS,
    PASS,
    RemoteStage,
    pack,
)
from megatron_ee.inference.replay import ExitReplay
from megatron_ee.inference.requests import Draft
from megatron_ee.inference.sampling import MAX_SEED, Sampling
from megatron_ee.inference.scheduler import Scheduler
from megatron_ee.inference.sequence import SequenceParams

DRAWN = Sampling(temperature=0.7, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=MAX_SEED)


def sent(content: Any) -> Any:
    return json.loads(json.dumps(content, allow_nan=False))


def same_types(one: Any, other: Any) -> bool:
    """Tuples stay tuples, whole numbers whole: equality alone would not tell 1 from 1.0."""
    return repr(one) == repr(other)


def test_passes() -> None:
    passes = [
        Pass(0, 3, (ScheduledSequence(1, 7, (5, 6, 7)), ScheduledSequence(2, 1, (9,), HeadInput("emit", 1)))),
        Pass(3, 6, (ScheduledSequence(4, 9),), sends=True),
        Pass(
            2,
            6,
            (
                ScheduledSequence(
                    1, 9, (), HeadInput("verify", 6, DRAWN, proposals=(1, 2, 3), seen=(5, 6, 1), logprobs=4)
                ),
                ScheduledSequence(
                    2, 3, (), HeadInput("leave", 3, policy=ThresholdPolicy(measure="entropy", threshold=0.1), layer=2)
                ),
                ScheduledSequence(5, 3, (), HeadInput("emit", 3, logprobs=0, forced=8)),
                ScheduledSequence(3, 3, (), HeadInput("draft", 3, DRAWN)),
            ),
        ),
    ]
    for pass_ in passes:
        received = PASS.validate_python(sent(pack(PASS, pass_)))
        assert received == pass_ and same_types(received, pass_)


def test_outputs() -> None:
    outputs = [
        HeadOutput((3,), (0.1,)),
        HeadOutput(),
        HeadOutput(finite=False),
        HeadOutput((1, 2), (0.25, 1.0), (LogProbs(-0.25, {7: -0.25, 11: -3.5}), LogProbs(-1.0, {}, -2.5))),
    ]
    received = HEAD_OUTPUTS.validate_python(sent(pack(HEAD_OUTPUTS, outputs)))
    assert received == outputs and same_types(received, outputs)
    assert HEAD_OUTPUTS.validate_python(sent(pack(HEAD_OUTPUTS, []))) == []


def test_replays() -> None:
    """Also where logits are not finite."""
    replays = [
        ExitReplay(2, (3,), (0.5,), (0.25,), (0.125,), (2,), (0.75,), (LogProbs(-0.5, {3: -0.5, 11: -1.0}, -1.5),)),
        ExitReplay(5, (3,), (0.5,), (0.25,), (0.0,), (9,), (), (LogProbs(-0.5, {}, -math.inf),)),
        ExitReplay(5, (3,), (math.nan,), (math.nan,), (math.nan,), (9,)),
    ]
    received = EXIT_REPLAYS.validate_python(json.loads(json.dumps(pack(EXIT_REPLAYS, replays))))
    assert received[:2] == replays[:2] and same_types(received, replays)
    assert [each.finite for each in received] == [True, True, False]


def test_params() -> None:
    common = {"request": 3, "sample": 1, "prompt_token_ids": (5, 6), "max_tokens": 9, "max_length": 11}
    for params in (
        SequenceParams(
            mode="threshold",
            policy=ThresholdPolicy(
                threshold=0.1, thresholds={2: 0.5, 11: 1.5}, measure="margin", max_deferred=3, min_full=4
            ),
            draft=Draft(),
            exits=(2, 11),
            draft_exits=(2,),
            sampling=DRAWN,
            stop_token_ids=frozenset([7, 3]),
            eos_token_ids=frozenset([3]),
            logprobs=0,
            forced_token_ids=(1, 2, 3),
            **common,
        ),
        SequenceParams(
            mode="speculative",
            policy=ThresholdPolicy(),
            draft=Draft(exit=2, length=0),
            exits=(),
            draft_exits=(),
            sampling=Sampling(),
            **common,
        ),
    ):
        received = PARAMS.validate_python(sent(pack(PARAMS, params)))
        assert received == params
        for name in (
            "prompt_token_ids",
            "exits",
            "draft_exits",
            "forced_token_ids",
            "policy",
            "draft",
            "sampling",
            "logprobs",
        ):
            assert same_types(getattr(received, name), getattr(params, name))


class Sent:
    """A ``Mail`` that keeps what is sent."""

    def __init__(self) -> None:
        self.found: list[tuple[int, Any]] = []

    def send(self, target: int, tag: int, content: Any) -> None:
        self.found.append((target, sent(content)))


def test_a_heartbeat_reaches_every_stage_with_what_waits_to_be_sent() -> None:
    mail = Sent()
    stages = [RemoteStage(mail, number) for number in (1, 2)]  # type: ignore[arg-type]
    kv_caches = KVCacheManager(stages, KVBudget(1, [], 0, 1))
    scheduler = Scheduler(stages, StageMap((2, 4, 7)), kv_caches, 1, None)  # type: ignore[arg-type]
    stages[1].close(3)
    scheduler.heartbeat()
    scheduler.heartbeat()
    assert mail.found == [(1, []), (2, [["close", 3]]), (1, []), (2, [])]
