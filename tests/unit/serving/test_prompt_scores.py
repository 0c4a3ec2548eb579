"""Log-probabilities of prompts: how their computation ends if the deadline comes first."""

from __future__ import annotations

import asyncio

import pytest

from megatron_ee.inference.requests import Request
from megatron_ee.serving.api.errors import ApiError
from megatron_ee.serving.engine_loop import EngineLoop
from megatron_ee.serving.prompt_scores import score_prompts
from megatron_ee.testing.serving import ScriptedEngine


def test_the_deadline_is_said_as_for_an_answer() -> None:
    async def main() -> None:
        loop = EngineLoop(ScriptedEngine(pause=0.01))  # type: ignore[arg-type]
        loop.start()
        try:
            with pytest.raises(ApiError) as found:
                await score_prompts(loop, [Request(prompt=tuple(range(1, 60)), logprobs=1)], 0.02)
        finally:
            await loop.stop()
        assert (found.value.status, found.value.problem.code) == (504, "timeout")
        assert found.value.headers == {"X-Should-Retry": "false"}, "the official client would wait as long again"

    asyncio.run(main())
