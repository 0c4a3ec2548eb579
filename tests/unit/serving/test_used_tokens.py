"""What a request has used of its key's minute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from megatron_ee.inference.requests import Completion, Event, Token
from megatron_ee.serving.api.prompts import Prompt
from megatron_ee.serving.generation import GenerationRun, PromptRun


def service_that_notes(used: list[int]) -> Any:
    return SimpleNamespace(
        access=SimpleNamespace(settle=lambda key, grant, tokens: used.append(tokens)), background_tasks=set()
    )


def no_decision() -> Any:
    return SimpleNamespace(request=SimpleNamespace(samples=2))


def test_tokens_of_outputs_that_failed_are_used_too() -> None:
    token, used = Token(7, 4, 0.5), list[int]()
    whole = Completion("xx", (token,) * 2, ("x",) * 2, "length", {})
    service, decision = service_that_notes(used), no_decision()

    async def main() -> None:
        part = PromptRun(Prompt((1, 2, 3), "abc"), decision)
        for event in (
            Event(0, 0, "xx", (token,) * 2, ("x",) * 2),
            Event(0, 1, "x" * 5, (token,) * 5, ("x",) * 5),
            Event(0, 0, completion=whole),
            Event(0, 1, error="the answer was read too slowly"),
        ):
            part.take(event)
        generation: Any = None
        GenerationRun(service, generation, None, None, [part], "cmpl-0").end()
        await asyncio.gather(*service.background_tasks)

    asyncio.run(main())
    assert used == [3 + 2 + 5]


def test_after_one_output_failed_the_tokens_of_the_others_are_used_too() -> None:
    token, used = Token(7, 4, 0.5), list[int]()
    service, decision = service_that_notes(used), no_decision()

    class Submission:
        """Output 1 has failed. Output 0 still has tokens, and ends because it is cancelled."""

        cancelled = timed_out = False

        def cancel(self) -> None:
            self.cancelled = True

        async def __aiter__(self) -> AsyncIterator[Event]:
            assert self.cancelled
            yield Event(0, 0, "xx", (token,) * 2, ("x",) * 2)
            yield Event(0, 0, completion=Completion("xx", (token,) * 2, ("x",) * 2, "cancelled", {}))

    async def main() -> None:
        submission: Any = Submission()
        part = PromptRun(Prompt((1, 2, 3), "abc"), decision, submission=submission)
        part.take(Event(0, 1, error="its logits are not finite"))
        generation: Any = None
        GenerationRun(service, generation, None, None, [part], "cmpl-0").end()
        await asyncio.gather(*service.background_tasks)
        assert len(part.completions) == 1 and part.status == "error"

    asyncio.run(main())
    assert used == [3 + 2]
