"""What the routes share."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from megatron_ee.serving.api.errors import refused
from megatron_ee.serving.api.request_bodies import ChatCompletionRequest, CompletionRequest, TokenizeRequest
from megatron_ee.serving.api.response_bodies import ErrorResponse
from megatron_ee.serving.service import Service

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "A field is wrong; the error names it.",
        401: "There is no valid API key.",
        404: "There is no such model or path.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        429: "Too many requests; Retry-After says when to try again.",
        500: "The engine failed.",
        503: "The server is not ready.",
        504: "The deadline came before the answer.",
    }.items()
}
"""Answers of every route that generates."""


def service_of(request: Request) -> Service:
    """The service of the application."""
    service: Service = request.app.state.service
    return service


def check_model(service: Service, name: str | None) -> None:
    """Refuse a request for another model.

    Raises:
        ApiError: naming this model.
    """
    if name is not None and name != service.model_name:
        raise refused(
            404, f"model: there is no model {name[:200]!r}; there is {service.model_name!r}", "model_not_found"
        )


def documented(body: type[CompletionRequest] | type[ChatCompletionRequest] | type[TokenizeRequest]) -> dict[str, Any]:
    """The OpenAPI description of a body, which the route reads itself."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
