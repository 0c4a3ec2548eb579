"""``/health``, ``/ready`` and ``/metrics``: whether the server lives, takes requests, and what it does."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatron_ee.serving.api.response_bodies import ServerStatus
from megatron_ee.serving.routes.common import service_of

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Whether the server lives", openapi_extra={"security": []})
async def health() -> ServerStatus:
    """Answers as long as the process does. It needs no key."""
    return ServerStatus(status="ok")


@router.get("/ready", summary="Whether the server takes requests", responses={503: {"model": ServerStatus}})
async def ready(request: Request) -> Response:
    """Status 200 while requests are taken, and 503 while the server ends. Nothing answers until the model is loaded."""
    takes = service_of(request).engine_loop.state().ready
    return JSONResponse({"status": "ready" if takes else "not ready"}, 200 if takes else 503)


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    service = service_of(request)
    service.metrics.loop(service.engine_loop.state())
    for test in () if service.auditor is None else service.auditor.tests():
        service.metrics.drift(test.certificate, test.task, test.monitor, fallback=test.fallback, restarts=test.restarts)
    content, media_type = service.metrics.exposition(request.headers.get("accept"))
    return Response(content, media_type=media_type)
