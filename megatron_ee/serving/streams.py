"""What is sent while a request runs: server-sent events, and the end of a request whose client has left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
PING_SECONDS = 15.0
"""Seconds without an event after which a comment is sent, so that proxies do not take the connection for dead."""
_PING = b": ping\n\n"


def server_sent(data: str) -> bytes:
    """A server-sent event that holds JSON, which has no line ends."""
    return f"data: {data}\n\n".encode()


class EventStream(Response):
    """A response of server-sent events.

    Args:
        events: encoded.
        on_end: called once when the response has ended, or the client has left.
    """

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # nginx passes events on as they come
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        sent = asyncio.Event()
        tasks = [
            asyncio.create_task(each)
            for each in (self._send(send, sent), _listen_for_disconnect(receive), _ping(send, sent))
        ]
        try:
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                with contextlib.suppress(OSError, ClientDisconnect):
                    tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._on_end()

    async def _send(self, send: Send, sent: asyncio.Event) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sent.set()
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
            sent.set()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def with_cancellation(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work``, which is cancelled if the client leaves.

    Args:
        receive: of the request, whose body has been read.
        work: to do.

    Raises:
        ClientDisconnect: the client has left.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_listen_for_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


async def _listen_for_disconnect(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ping(send: Send, sent: asyncio.Event) -> None:
    """Send a comment after each ``PING_SECONDS`` without an event, once the response has started."""
    await sent.wait()
    while True:
        sent.clear()
        await asyncio.sleep(PING_SECONDS)
        if not sent.is_set():
            await send({"type": "http.response.body", "body": _PING, "more_body": True})
