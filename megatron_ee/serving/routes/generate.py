"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from megatron_ee.serving.answers import ChatAnswer, ExitSummary, TextAnswer, Usage
from megatron_ee.serving.api_errors import ApiError
from megatron_ee.serving.bodies import read_body
from megatron_ee.serving.generation import Running, admit
from megatron_ee.serving.protocol import ChatBody, CompletionBody
from megatron_ee.serving.responses import exit_summary, new_heading, usage_of
from megatron_ee.serving.routes.common import ERRORS, check_model, documented, service_of
from megatron_ee.serving.service import Service
from megatron_ee.serving.streams import EventStream, server_sent, unless_left
from megatron_ee.serving.translate import Generation, chat_generation, completion_generation
from megatron_ee.serving.writers import AnswerWriter, ChatWriter, TextWriter

PRIORITY = "X-Priority"
DONE = "[DONE]"
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}
router = APIRouter(responses=ERRORS)


@router.post(
    "/v1/completions",
    response_model=TextAnswer,
    summary="Continue one or more texts",
    responses=STREAMED,
    openapi_extra=documented(CompletionBody),
)
async def completions(request: Request) -> Response:
    """Continue texts or token ids, as OpenAI's and vLLM's completions."""
    service = service_of(request)
    limits, key = service.limits, request.state.key

    def translate(body: CompletionBody) -> Generation:
        check_model(service, body.model)
        defaults = partial(service.rules.decoding, key=key)
        return completion_generation(body, service.facts, limits, request.headers.get(PRIORITY), defaults)

    generation = await read_body(request, CompletionBody, translate, limits.max_body)
    return await _generate(request, service, generation, TextWriter)


@router.post(
    "/v1/chat/completions",
    response_model=ChatAnswer,
    summary="Answer a conversation",
    responses=STREAMED,
    openapi_extra=documented(ChatBody),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation in the model's chat template, as OpenAI's and vLLM's chat completions."""
    service = service_of(request)
    limits, key = service.limits, request.state.key

    def translate(body: ChatBody) -> Generation:
        check_model(service, body.model)
        defaults = partial(service.rules.decoding, key=key)
        budget = None if key is None else key.tokens_per_minute
        return chat_generation(body, service.facts, limits, request.headers.get(PRIORITY), defaults, budget)

    generation = await read_body(request, ChatBody, translate, limits.max_body)
    return await _generate(request, service, generation, ChatWriter)


async def _generate(request: Request, service: Service, generation: Generation, kind: type[AnswerWriter]) -> Response:
    heading = new_heading(generation, service.model_name)
    running = await unless_left(request.receive, admit(service, generation, request.state.key, heading.id))
    writer = kind(service, running, heading)
    if generation.stream:
        return EventStream(_chunks(running, writer), running.end)
    try:
        return await unless_left(request.receive, _whole(running, writer))
    finally:
        running.end()


async def _whole(running: Running, writer: AnswerWriter) -> Response:
    """The whole answer, when it is ready."""
    async for _ in running.events():
        pass
    summary, used = _summary(running), _usage(running)
    return Response(writer.whole(running.completions, used, summary), media_type="application/json")


async def _chunks(running: Running, writer: AnswerWriter) -> AsyncIterator[bytes]:
    """The answer in server-sent events, as it is generated. An error is the last event."""
    left = len(writer.indices)
    try:
        for chunk in writer.opening():
            yield server_sent(chunk)
        async for index, event in running.events():
            left -= event.completion is not None
            ended = event.completion is not None and not left
            data = writer.chunk(index, event, _summary(running) if ended else None)
            if data is not None:
                yield server_sent(data)
        if running.generation.include_usage:
            yield server_sent(writer.closing(_usage(running)))
        yield server_sent(DONE)
    except ApiError as error:
        yield server_sent(error.json())


def _usage(running: Running) -> Usage:
    return usage_of(running.generation, running.completions)


def _summary(running: Running) -> ExitSummary:
    return exit_summary(running.parts[0].decision, running.completions)
