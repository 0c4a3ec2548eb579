"""``/v1/models``, ``/v1/exits`` and ``/tokenize``: what there is, without generating."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from megatron_ee.inference.requests import Mode, prompt_ids
from megatron_ee.inference.requests import Request as EngineRequest
from megatron_ee.serving.api.prompts import conversation_prompt
from megatron_ee.serving.api.read_body import read_body
from megatron_ee.serving.api.request_bodies import TokenizeRequest
from megatron_ee.serving.api.response_bodies import ExitsResponse, ModelEntry, ModelList, TokenizeResponse
from megatron_ee.serving.routes.common import ERRORS, check_model, documented, service_of
from megatron_ee.serving.service import Service

router = APIRouter(responses={status: ERRORS[status] for status in (400, 401, 404)})


def _entry(service: Service) -> ModelEntry:
    return ModelEntry(id=service.model_name, created=service.created, max_model_len=service.engine_loop.max_positions)


@router.get("/v1/models", summary="List the model")
async def models(request: Request) -> ModelList:
    """The model that this server has."""
    return ModelList(data=[_entry(service_of(request))])


@router.get("/v1/models/{name:path}", summary="Describe a model")
async def model(request: Request, name: str) -> ModelEntry:
    """A model by its name."""
    service = service_of(request)
    check_model(service, name)
    return _entry(service)


@router.get("/v1/exits", summary="List exits, rules and certificates")
async def exits(request: Request) -> ExitsResponse:
    """The exits, the rules by task as they hold for the key that asks, and the certificates in force."""
    service = service_of(request)
    return ExitsResponse(
        num_layers=service.engine_loop.num_layers,
        exits=[
            {"layer": spec.layer, "body": spec.body, "head": spec.head, "gate": bool(spec.gate)}
            for spec in service.engine_loop.exits
        ],
        modes=list(get_args(Mode)) if service.engine_loop.exits else ["full"],
        max_tokens=service.limits.max_tokens,
        rules=service.rules.describe(request.state.key),
        audits=None if service.auditor is None else service.auditor.state(),
    )


@router.post(
    "/tokenize",
    summary="Tokenize a text or a conversation",
    responses={status: ERRORS[status] for status in (413, 415, 429)},
    openapi_extra=documented(TokenizeRequest),
    response_model=TokenizeResponse,
)
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, as the generating routes see it. It counts as a request of its key."""
    service = service_of(request)
    service.access.take(request.state.key, 0)

    def work(body: TokenizeRequest) -> str:
        check_model(service, body.model)
        ids = _ids(body, service)
        names = [service.tokenizer.name_of(token) for token in ids] if body.return_token_strs else None
        answer = TokenizeResponse(
            count=len(ids), max_model_len=service.engine_loop.max_positions, tokens=list(ids), token_strs=names
        )
        return answer.model_dump_json(exclude_none=True)  # here, since it may be megabytes

    answer = await read_body(request, TokenizeRequest, work, service.limits.max_body)
    return Response(answer, media_type="application/json")


def _ids(body: TokenizeRequest, service: Service) -> tuple[int, ...]:
    """The ids, also of a prompt that is longer than the model's context; but no longer than a body's limit allows."""
    facts = replace(service.facts, max_positions=service.limits.max_body)
    if body.messages is not None:
        return conversation_prompt(body.messages, facts).ids
    prompt = body.prompt or ""
    if not prompt:
        return ()
    ids = prompt_ids(EngineRequest(prompt=prompt), facts.tokenizer, facts.vocab_size, facts.max_positions)
    return tuple(facts.tokenizer.encode(prompt)) if body.add_special_tokens is False else ids
