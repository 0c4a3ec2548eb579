"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from megatron_ee.serving.api.errors import ApiError
from megatron_ee.serving.api.read_body import read_body
from megatron_ee.serving.api.request_bodies import ChatCompletionRequest, CompletionRequest
from megatron_ee.serving.api.response_bodies import ChatCompletionResponse, CompletionResponse
from megatron_ee.serving.api.translate import Context, Generation, chat_generation, completion_generation
from megatron_ee.serving.generation import GenerationRun, admit
from megatron_ee.serving.routes.common import ERRORS, check_model, documented, service_of
from megatron_ee.serving.streams import EventStream, server_sent, with_cancellation
from megatron_ee.serving.writers import ChatWriter, CompletionWriter, ResponseWriter, new_id

B = TypeVar("B", CompletionRequest, ChatCompletionRequest)
PRIORITY = "X-Priority"
DONE = "[DONE]"
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}
router = APIRouter(responses=ERRORS)


@router.post(
    "/v1/completions",
    response_model=CompletionResponse,
    summary="Continue one or more texts",
    responses=STREAMED,
    openapi_extra=documented(CompletionRequest),
)
async def completions(request: Request) -> Response:
    """Continue texts or token ids, as OpenAI's and vLLM's completions."""
    return await _generate(request, CompletionRequest, completion_generation, CompletionWriter)


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletionResponse,
    summary="Answer a conversation",
    responses=STREAMED,
    openapi_extra=documented(ChatCompletionRequest),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation in the model's chat template, as OpenAI's and vLLM's chat completions."""
    return await _generate(request, ChatCompletionRequest, chat_generation, ChatWriter)


async def _generate(
    request: Request, kind: type[B], translate: Callable[[B, Context], Generation], writes: type[ResponseWriter]
) -> Response:
    service, key = service_of(request), request.state.key
    context = Context(
        service.facts,
        service.limits,
        request.headers.get(PRIORITY),
        partial(service.rules.decoding, key=key),
        None if key is None else key.tokens_per_minute,
    )

    def use(body: B) -> Generation:
        check_model(service, body.model)
        return translate(body, context)

    generation = await read_body(request, kind, use, service.limits.max_body)
    admission = admit(service, generation, key, new_id(chat=generation.chat))
    run = await with_cancellation(request.receive, admission)
    writer = writes(service, run)
    if generation.stream:
        return EventStream(_chunks(run, writer), run.end)
    try:
        return await with_cancellation(request.receive, _whole(run, writer))
    finally:
        run.end()


async def _whole(run: GenerationRun, writer: ResponseWriter) -> Response:
    """The whole response, when it is ready."""
    async for _ in run.events():
        pass
    return Response(writer.whole(), media_type="application/json")


async def _chunks(run: GenerationRun, writer: ResponseWriter) -> AsyncIterator[bytes]:
    """The response in server-sent events, as it is generated. An error is the last event."""
    left = len(writer.indices)
    try:
        for chunk in writer.opening():
            yield server_sent(chunk)
        async for index, event in run.events():
            left -= event.completion is not None
            data = writer.chunk(index, event, last=event.completion is not None and not left)
            if data is not None:
                yield server_sent(data)
        if run.generation.include_usage:
            yield server_sent(writer.closing())
        yield server_sent(DONE)
    except ApiError as error:
        yield server_sent(error.json())
