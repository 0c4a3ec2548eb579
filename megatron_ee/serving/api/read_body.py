"""Read the body of a request: bounded, strict JSON, in one of the known forms."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread
from starlette.requests import Request

from megatron_ee.config.untrusted import parse_json
from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import ConfigError, DamagedError
from megatron_ee.serving.api.errors import BODY, ApiError, refused

B = TypeVar("B", bound=Strict)
T = TypeVar("T")
JSON = "application/json"
DISCARD_SECONDS = 2.0
"""Seconds for the rest of a body that is refused."""


async def read_body(request: Request, kind: type[B], use: Callable[[B], T], limit: int) -> T:
    """Read a body and hand it to ``use``, both in a worker thread: a long prompt must not hold up other requests.

    Args:
        request: whose body has not been read.
        kind: of the body.
        use: what to do with it.
        limit: bytes of the body.

    Raises:
        ApiError: it is not JSON by its headers, or too large.
        ConfigError: it is not valid; or as ``use``. The message names the field.
    """
    try:
        _check_headers(request, limit)
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > limit:
                raise _too_large(limit)
    except ApiError:
        await _discard(request)
        raise

    def work() -> T:
        try:
            values = parse_json(bytes(content), BODY)
        except DamagedError as error:
            raise ConfigError(str(error)) from None
        if not isinstance(values, dict):
            raise ConfigError(f"{BODY}: must be a JSON object, not {type(values).__name__}")
        return use(validated(kind, values))

    return await anyio.to_thread.run_sync(work)


def _check_headers(request: Request, limit: int) -> None:
    kind = request.headers.get("content-type", "")
    media, *parameters = [part.strip().lower() for part in kind.split(";")]
    # A web page of another origin may send text or forms without asking, but not JSON.
    charsets = [each.partition("=")[2].strip('"') for each in parameters if each.startswith("charset=")]
    if media != JSON or any(charset != "utf-8" for charset in charsets):
        raise refused(415, f"the Content-Type must be {JSON}, in UTF-8", "unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise refused(
            415, "compressed bodies are not supported; send it without Content-Encoding", "unsupported_coding"
        )
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise _too_large(limit)


async def _discard(request: Request) -> None:
    """Take the rest of a body that is refused: closing the connection before would lose the answer on its way."""
    if "expect" in request.headers:  # the client has not sent it yet
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while (await request.receive()).get("more_body"):
                pass


def _too_large(limit: int) -> Exception:
    # A client that goes on sending ends with this connection.
    return refused(413, f"the body is larger than {limit} bytes", "body_too_large", {"Connection": "close"})
