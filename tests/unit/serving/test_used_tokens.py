"""What a request has used of its key's minute."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from megatron_ee.inference.requests import Completion, Event, Token
from megatron_ee.serving.api.prompts import Prompt
from megatron_ee.serving.generation import GenerationRun, PromptRun


def test_tokens_of_outputs_that_failed_are_used_too() -> None:
    token, used = Token(7, 4, 0.5), []
    whole = Completion("xx", (token,) * 2, ("x",) * 2, "length", {})
    service: Any = SimpleNamespace(
        access=SimpleNamespace(settle=lambda key, grant, tokens: used.append(tokens)), tasks=set()
    )
    decision: Any = None

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
        await asyncio.gather(*service.tasks)

    asyncio.run(main())
    assert used == [3 + 2 + 5]
