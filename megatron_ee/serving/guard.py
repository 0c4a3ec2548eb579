"""What holds for every route: keys, a limit of open requests, security headers, no answer without OpenAI's shape."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import logging
import traceback
import uuid
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_ee.serving.access import Unauthorized
from megatron_ee.serving.api.errors import INTERNAL, QUEUE_SECONDS, invalid, of_error, refused
from megatron_ee.serving.metrics import REFUSALS

if TYPE_CHECKING:
    from megatron_ee.serving.service import Service

OPEN_PATHS = ("/health",)
"""Paths that need no key."""
UNCOUNTED_PATHS = ("/health", "/metrics")
"""Paths that are answered whatever the number of open requests."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
_LOGGER = logging.getLogger(__name__)


class Guard:
    """Wraps the application. It adds no CORS headers, so browsers keep pages of other origins out.

    Args:
        app: the routes.
        service: with the keys and the limit of open requests.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service, self._open = app, service, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        request_id = uuid.uuid4().hex

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(raw=message["headers"])
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
                headers["X-Request-Id"] = request_id
                if scope["method"] == "POST" and message["status"] in REFUSALS:
                    self._service.metrics.refused(message["status"])
            await send(message)

        try:
            scope.setdefault("state", {})["key"] = None
            if scope["path"] not in OPEN_PATHS:
                authorization = bearer(Headers(scope=scope).get("authorization"))
                scope["state"]["key"] = self._service.access.authenticate(authorization)
            # Counted after the key is checked, so that strangers cannot keep others out.
            if scope["path"] in UNCOUNTED_PATHS:
                await self._app(scope, receive, guarded)
            elif self._open >= self._service.max_requests:
                await self._full()(scope, receive, guarded)
            else:
                self._open += 1
                try:
                    await self._app(scope, receive, guarded)
                finally:
                    self._open -= 1
        except Unauthorized as error:
            await of_error(error).response()(scope, receive, guarded)
        except ClientDisconnect:
            pass
        except Exception as error:
            # Without its text, which may be part of a prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            _LOGGER.error("%s in request %s:\n%s", type(error).__name__, request_id, frames)
            if not started:
                await INTERNAL.response()(scope, receive, guarded)

    def _full(self) -> Response:
        message = f"{self._open} requests are open, as many as may be; try again later"
        return refused(503, message, "too_many_requests", {"Retry-After": str(QUEUE_SECONDS)}).response()


class LocalHosts:
    """Refuses requests that name another host than this machine, for a server that has no keys.

    A web page could otherwise make the user's browser send requests under a name of its own (DNS rebinding).

    Args:
        app: gets the other requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        checked = scope["type"] == "http" and scope["path"] not in OPEN_PATHS
        if checked and not _is_local(Headers(scope=scope).get("host", "")):
            message = "Host: must be localhost or a loopback address; a server for other names needs --api-key-file"
            await invalid(message).response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_local(host: str) -> bool:
    """Whether a ``Host`` header names this machine. Names that a DNS server resolves do not."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def bearer(authorization: str | None) -> str | None:
    """An ``Authorization`` header with the key as bearer token.

    Browsers send what the user types as ``Basic``: any name, and the key as password.
    """
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        _, _, key = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return authorization
    return f"Bearer {key}"
