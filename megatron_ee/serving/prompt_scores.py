"""The log-probabilities of prompts, for ``echo`` with ``logprobs``: a request of its own scores each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from megatron_ee.inference.requests import Completion, Draft, Request
from megatron_ee.inference.sampling import Sampling
from megatron_ee.serving.api.errors import failure_of
from megatron_ee.serving.api.logprobs import ScoredToken, scored_prompt
from megatron_ee.serving.engine_loop import EngineLoop
from megatron_ee.serving.submission import Submission, merged


async def score_prompts(
    engine_loop: EngineLoop, requests: Sequence[Request], deadline: float | None
) -> list[list[ScoredToken]]:
    """Compute the log-probabilities of the tokens of requests' prompts.

    Args:
        engine_loop: runs them.
        requests: whose prompts are token ids.
        deadline: seconds; None for no limit.

    Raises:
        UserError: see ``EngineLoop.submit``.
        ApiError: an output failed, the deadline has come, or the server is stopping.
    """
    completions: dict[int, Completion] = {}
    indices = [index for index, request in enumerate(requests) if len(request.prompt) > 1]  # a first token has none
    submissions: list[Submission] = []
    try:
        for index in indices:
            request = scoring_request(requests[index])
            submissions.append(engine_loop.submit(request, deadline=deadline, more=bool(submissions)))
        for submission in submissions:
            await submission.admitted()
        async with aclosing(merged(submissions)) as events:
            async for at, event in events:
                if (failure := failure_of(event, submissions[at], deadline)) is not None:
                    raise failure
                if event.completion is not None:
                    completions[indices[at]] = event.completion
    finally:
        for submission in submissions:
            submission.cancel()
    return [scored_prompt(_ids(request), completions.get(index)) for index, request in enumerate(requests)]


def scoring_request(request: Request) -> Request:
    """A request whose completion gives ``scored_prompt`` the log-probabilities of the tokens of another one's prompt.

    It runs in the other one's mode, so that threshold mode's exits are scored: token by token, because where a token
    leaves depends on those before it. Speculative mode's output is full mode's. A certificate does not cover it, so
    that a request under one is scored in full mode.
    """
    ids = _ids(request)
    changes = {
        "prompt": ids[:1],
        "samples": 1,
        "sampling": Sampling(),  # log-probabilities do not depend on it
        "stop": (),
        "stop_ids": (),
        "coverage": None,
    }
    if request.mode == "threshold" and request.coverage is None:
        changes |= {"forced_ids": ids[1:], "max_tokens": len(ids) - 1}
    else:
        changes |= {"replay_ids": ids[1:], "mode": "full", "exits": (), "draft": Draft()}  # only the final exit
    return request.model_copy(update=changes)


def _ids(request: Request) -> tuple[int, ...]:
    assert not isinstance(request.prompt, str), "prompts have been tokenized"
    return request.prompt
