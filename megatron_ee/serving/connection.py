"""One client's connection: uvicorn's HTTP/1.1 protocol, with time limits for clients that send or read too slowly."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_ee.serving.api.errors import invalid

READ_SECONDS = 30.0
"""Seconds for a whole request: from the connection for the first one, from its first byte for later ones."""
WRITE_SECONDS = 30.0
"""Seconds in which a client must take what waits to be sent, or ``WRITE_BYTES`` of it."""
WRITE_BYTES = 2**16


class ClientConnection(H11Protocol):
    """Closes a connection whose client stalls. Otherwise it would count against the limit of connections for ever.

    uvicorn itself limits only the time between two requests. Its own limit of connections answers with plain text, so
    it is not used: requests are counted by ``guard.Guard``, and this closes what is far above their number.
    """

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, max_connections: int | None = None, **settings: Any) -> None:
        """Take ``max_connections`` and what uvicorn gives.

        Args:
            arguments: of uvicorn.
            max_connections: open connections; further ones are closed without an answer. None for any number.
            settings: of uvicorn.
        """
        super().__init__(*arguments, **settings)
        self._max_connections = max_connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request. Above the limit of connections, where even an answer is too much, close it."""
        super().connection_made(transport)
        if self._max_connections is not None and len(self.connections) > self._max_connections:
            transport.abort()
        self._reading = self.loop.call_later(READ_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request. The limit ends with the last part."""
        if self._reading is None:
            self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY, h11.ERROR):
            self._reading = _stopped(self._reading)

    def pause_writing(self) -> None:
        """The client reads more slowly than the response is made."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """The client has read what waited."""
        super().resume_writing()
        self._writing = _stopped(self._writing)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP with an error of OpenAI's shape, and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a response has begun
            self.transport.close()
            return
        body = invalid(msg).json().encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the limits."""
        self._reading, self._writing = _stopped(self._reading), _stopped(self._writing)
        super().connection_lost(exc)

    def _watch_writing(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._writing = self.loop.call_later(WRITE_SECONDS, self._check_writing, left)

    def _check_writing(self, before: int) -> None:
        """Close the connection, unless the client goes on taking a long response."""
        if before - self.transport.get_write_buffer_size() < WRITE_BYTES:
            self.transport.abort()
        else:
            self._watch_writing()


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer, after the given one has been stopped."""
    if timer is not None:
        timer.cancel()
    return None
