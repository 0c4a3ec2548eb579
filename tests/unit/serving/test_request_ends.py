"""Deadline of a request whose prompts are scored first, and what is recorded at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ee.inference.requests import Completion, Request, Token
from megatron_ee.serving.api.prompts import Prompt
from megatron_ee.serving.api.translate import Generation
from megatron_ee.serving.exit_record import ExitRecord
from megatron_ee.serving.generation import GenerationRun, PromptRun, admit
from megatron_ee.serving.rules.rules import Controls, Decision

STATISTICS = {
    **{"prompt_tokens": 3, "reused_tokens": 0, "tokens": 1, "rounds": 0, "proposed": 0, "accepted": 0},
    **{
        "tokens_by_layer": {"4": 1},
        "confidences": [0.5],
        "later_tokens": 0,
        "layer_runs": 0,
        "time_to_first_token": 0.1,
    },
    **{"queue_time": 0.0, "decode_time": 0.0, "drafts": 0, "accepted_per_position": []},
}
WHOLE = Completion("x", (Token(7, 4, 0.5),), ("x",), "length", STATISTICS)


def test_one_prompts_audit_holds_up_no_other_prompt() -> None:
    """An audit of a busy server takes ten minutes, and a request may have 128 prompts."""
    written, begun, may_end = list[ExitRecord](), list[int](), asyncio.Event()

    async def audit(number: int, early: object) -> None:
        begun.append(number)
        await may_end.wait()

    service: Any = SimpleNamespace(
        access=SimpleNamespace(settle=lambda key, grant, tokens: None),
        background_tasks=set(),
        engine_loop=SimpleNamespace(num_layers=4),
        metrics=SimpleNamespace(request=lambda record, figures: None),
        auditor=SimpleNamespace(audit=audit),
        exit_log=SimpleNamespace(write=lambda record: written.append(record) or True),
    )

    async def main() -> None:
        decision = Decision(Request(prompt=(1, 2, 3)), "t", "full", "default", None)
        parts = [
            PromptRun(Prompt((1, 2, 3), "abc"), decision, number, audited=number < 2, ended={0: WHOLE})
            for number in range(3)
        ]
        generation: Any = None
        GenerationRun(service, generation, None, None, parts, "cmpl-0").end()
        await asyncio.sleep(0.05)
        assert begun == [0, 1] and [each.number for each in written] == [2]
        may_end.set()
        await asyncio.gather(*service.background_tasks)

    asyncio.run(main())
    assert [each.id for each in written] == ["cmpl-0-2", "cmpl-0-0", "cmpl-0-1"]
    assert len({each.seconds for each in written}) == 1, "the request's, not its audit's"


def test_a_prompts_scores_and_its_answer_share_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines = []

    async def score(loop: object, requests: Sequence[Request], deadline: float) -> list[list[object]]:
        deadlines.append(deadline)
        await asyncio.sleep(0.05)
        return [[] for _ in requests]

    def submit(request: Request, *, deadline: float, streamed: bool, more: bool) -> object:
        deadlines.append(deadline)
        return SimpleNamespace(admitted=lambda: asyncio.sleep(0))

    def decide(request: Request, controls: Controls, key: None, *, chat: bool) -> Decision:
        return Decision(request, "t", "full", "default", None)

    monkeypatch.setattr("megatron_ee.serving.generation.score_prompts", score)
    service: Any = SimpleNamespace(
        rules=SimpleNamespace(decide=decide),
        access=SimpleNamespace(take=lambda key, tokens: None),
        limits=SimpleNamespace(deadline=10.0),
        engine_loop=SimpleNamespace(submit=submit),
        numbers=iter(range(9)),
        auditor=None,
    )
    prompt, request = Prompt((1, 2, 3), "abc"), Request(prompt=(1, 2, 3))
    generation = Generation(False, (prompt,), (request,), Controls(), max_tokens=4, echo=True, logprobs=0)
    run = asyncio.run(admit(service, generation, None, "cmpl-0"))
    assert run.parts[0].number == 0
    assert deadlines[0] == 10.0 and 0 < deadlines[1] <= 9.95
