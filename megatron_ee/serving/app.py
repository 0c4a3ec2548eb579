"""The application: all routes, their errors in OpenAI's shape, and their description in OpenAPI."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import megatron_ee
from megatron_ee.errors import UserError
from megatron_ee.serving.api.errors import ApiError, of_error, refused
from megatron_ee.serving.api.request_bodies import ChatCompletionRequest, CompletionRequest, TokenizeRequest
from megatron_ee.serving.guard import Guard
from megatron_ee.serving.routes import generate, models, page, state
from megatron_ee.serving.service import Service

BODIES = (CompletionRequest, ChatCompletionRequest, TokenizeRequest)
_PLACE = "#/components/schemas/{model}"


class _Application(FastAPI):
    """FastAPI, which also describes the bodies that the routes read themselves."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI schema."""
        if self.openapi_schema is None:
            schema = get_openapi(title=self.title, version=self.version, summary=self.summary, routes=self.routes)
            _, bodies = models_json_schema([(body, "validation") for body in BODIES], ref_template=_PLACE)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
            self.openapi_schema = schema
        return self.openapi_schema


def build_app(service: Service) -> FastAPI:
    """The application of a service.

    Its routes are described at ``/openapi.json``. FastAPI's own pages of documentation are off: they load scripts from
    the network.
    """
    app = _Application(
        title="megatron_ee",
        version=megatron_ee.__version__,
        summary="OpenAI's API for a model with early exits",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for module in (generate, models, page, state):
        app.include_router(module.router)
    app.mount("/page", page.page_files())
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _invalid_parameter)
    app.add_middleware(Guard, service=service)
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return of_error(error).response()


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refused(error.status_code, str(error.detail), headers=error.headers).response()


async def _invalid_parameter(request: Request, error: Exception) -> Response:
    return refused(400, "a parameter of the address is wrong").response()
