"""The server's address, its limits of connections, its signals and its end, as a process over a scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from megatron_ee.errors import ConfigError, UserError
from megatron_ee.serving import connection
from megatron_ee.serving.engine_loop import EngineFailed, EngineLoop, LoopLimits
from megatron_ee.serving.server import MAX_HEADER_BYTES, ServerOptions, check_address, listen, run_server, url
from megatron_ee.testing.ranks import Ranks
from megatron_ee.testing.serving import ScriptedEngine, stream_app

SECONDS = 20.0
"""For what should take much less, on a machine that is shared."""


def serve(folder: Path, port: int, options: ServerOptions, engine: dict[str, Any], limits: LoopLimits) -> str:
    """Serve in this process; what ended it."""
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    connection.READ_SECONDS = connection.WRITE_SECONDS = 1.0
    scripted = ScriptedEngine(**engine)
    engine_loop = EngineLoop(scripted, limits)  # type: ignore[arg-type]

    def reload() -> None:
        if (folder / "fault").exists():
            scripted.fault = RuntimeError("device lost")
            return
        raise UserError("rules.yaml: is not YAML")

    listener = listen("127.0.0.1", port)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # of the connections: little waits in the kernel
    (folder / "url.part").write_text(url(listener))
    (folder / "url.part").rename(folder / "url")
    try:
        run_server(stream_app(engine_loop, reload=reload), engine_loop, listener, options)
    except EngineFailed as error:
        return str(error)
    return "ended"


class Server:
    """A server process."""

    def __init__(self, folder: Path, port: int, **settings: Any) -> None:
        folder.mkdir()
        self.folder = folder
        options = settings.get("options", ServerOptions())
        self._ranks = Ranks(
            1, serve, folder, port, options, settings.get("engine", {}), settings.get("limits", LoopLimits())
        )
        self.pid: int = self._ranks.processes[0].pid
        self.until(lambda: "listens on" in self.said())
        self.url = (folder / "url").read_text()
        self.port = int(self.url.rpartition(":")[2])

    def said(self) -> str:
        path = self.folder / "stderr"
        return path.read_text() if path.exists() else ""

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ready(self) -> int:
        # Without certificates, which take longer to load than the answer takes.
        return httpx.get(self.url + "/ready", timeout=SECONDS, verify=False).status_code

    def stream(self, tokens: int) -> Iterator[dict[str, Any]]:
        """The events of a request."""
        body = {"prompt": "x", "max_tokens": tokens}
        with httpx.stream("POST", self.url + "/stream", json=body, timeout=SECONDS) as response:
            assert response.status_code == 200, response.read()
            yield from map(json.loads, response.iter_lines())

    def end(self) -> str:
        """What ended the process, which must end by itself."""
        [result] = self._ranks.results()
        self._ranks.processes[0].join(SECONDS)
        return str(result)

    def kill(self) -> None:
        self._ranks.__exit__()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers; none is left over."""
    servers: list[Server] = []

    def start(port: int = 0, **settings: Any) -> Server:
        servers.append(Server(tmp_path / f"server-{len(servers)}", port, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def test_other_machines_need_keys() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        check_address(host, keys=False)
    for host in ("0.0.0.0", "::", "192.0.2.7"):
        with pytest.raises(ConfigError, match="can be reached from other machines; give the keys .* --api-key-file"):
            check_address(host, keys=False)
        check_address(host, keys=True)
    with pytest.raises(ConfigError, match="--host: no such host has no address"):
        check_address("no such host", keys=True)


IN_USE = "--port: cannot listen on 127.0.0.1, port .*: Address already in use"


@pytest.mark.parametrize("ready", [True, False])
def test_a_port_in_use_is_refused(ready: bool) -> None:
    with listen("127.0.0.1", 0) as first:
        if ready:  # otherwise its model is being loaded
            first.listen()
        with pytest.raises(ConfigError, match=IN_USE):
            listen("127.0.0.1", first.getsockname()[1])


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--host: cannot listen on 192\.0\.2\.1, .*; give an address of this"):
        listen("192.0.2.1", 0)  # reserved for documentation


def test_one_of_two_servers_gets_the_port_of_one_that_has_just_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as old:
        port = old.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        old.accept()[0].close()  # its side of the connection stays in TIME_WAIT
        client.close()
    with listen("127.0.0.1", port), pytest.raises(ConfigError, match=IN_USE):
        listen("127.0.0.1", port)


def test_a_signal_lets_running_requests_end(start: Callable[..., Server]) -> None:
    server = start(engine={"pause": 0.02})
    events = server.stream(50)
    assert next(events)["ids"] == [0] and server.ready() == 200
    server.send(signal.SIGTERM)
    server.until(lambda: server.ready() == 503)
    refused = httpx.post(server.url + "/stream", json={"prompt": "x"}, timeout=SECONDS)
    assert refused.status_code == 503 and "stopping" in refused.text
    rest = list(events)
    assert rest[-1]["end"] == "length" and len(rest) == 49
    assert server.end() == "ended"
    again = start(port=server.port)  # although its connections have just been closed
    assert list(again.stream(3))[-1]["end"] == "length"
    again.send(signal.SIGINT)
    assert again.end() == "ended"


def test_what_runs_too_long_is_cancelled(start: Callable[..., Server]) -> None:
    server = start(engine={"pause": 0.005}, options=ServerOptions(drain_seconds=0.3))
    events = server.stream(10**6)
    next(events)
    server.send(signal.SIGTERM)
    assert list(events)[-1]["end"] == "cancelled"
    assert server.end() == "ended"


def test_a_second_signal_cancels_at_once(start: Callable[..., Server]) -> None:
    server = start(engine={"pause": 0.005}, options=ServerOptions(drain_seconds=600))
    events = server.stream(10**6)
    next(events)
    server.send(signal.SIGTERM)
    server.until(lambda: "after at most 600 s" in server.said())
    server.send(signal.SIGTERM)
    assert list(events)[-1]["end"] == "cancelled"
    assert server.end() == "ended" and "cancels the running requests" in server.said()


def test_rules_that_cannot_be_read_again_change_nothing(start: Callable[..., Server]) -> None:
    server = start(engine={"pause": 0.01})
    events = server.stream(30)
    next(events)
    server.send(signal.SIGHUP)
    server.until(
        lambda: "reload failed: rules.yaml: is not YAML; what could not be read stays as it was" in server.said()
    )
    assert list(events)[-1]["end"] == "length" and server.ready() == 200


def test_a_failed_engine_ends_the_server_after_telling_its_clients(start: Callable[..., Server]) -> None:
    server = start(engine={"pause": 0.01})
    events = server.stream(10**6)
    next(events)
    (server.folder / "fault").touch()
    server.send(signal.SIGHUP)
    last = list(events)[-1]
    assert last["error"] == "the engine has failed; the server's log says why"
    assert server.end().startswith("the engine failed: RuntimeError: device lost (testing/serving.py:")


def test_only_names_of_loopback_are_served_without_keys(start: Callable[..., Server]) -> None:
    server = start()

    def ask(host: str) -> httpx.Response:
        return httpx.get(server.url + "/ready", headers={"Host": host}, timeout=SECONDS)

    for host in ("localhost", "LOCALHOST:1", f"127.0.0.1:{server.port}", "127.0.0.2", "[::1]:80"):
        assert ask(host).status_code == 200
    for host in ("attacker.example", "attacker.example:8000", "localhost.attacker.example", "[::1", "0.0.0.0", ""):
        refused = ask(host)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "Host", host
    probe = httpx.get(server.url + "/health", headers={"Host": ""}, timeout=SECONDS)
    assert probe.status_code != 400
    other = start(options=ServerOptions(any_host=True))
    assert httpx.get(other.url + "/ready", headers={"Host": "ee.example"}, timeout=SECONDS).status_code == 200


def received(client: socket.socket) -> bytes:
    """All that the server sends until it closes the connection."""
    client.settimeout(SECONDS)
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_clients_that_stall_are_disconnected(start: Callable[..., Server]) -> None:
    server = start(engine={"slots": 64}, limits=LoopLimits(buffer_events=64))
    address = ("127.0.0.1", server.port)
    silent, slow, trickling, again = (socket.create_connection(address) for _ in range(4))
    again.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
    while not again.recv(65536).endswith(b"{}"):
        pass
    again.sendall(b"GET /ready HTTP/1.1\r\n")
    slow.sendall(b"POST /stream HTTP/1.1\r\nHost: localhost\r\n")
    trickling.sendall(b'POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n{"prompt"')
    stop = threading.Event()

    def trickle() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.1):
                trickling.sendall(b" ")

    thread = threading.Thread(target=trickle)
    thread.start()
    body = json.dumps({"prompt": "x", "max_tokens": 10**7}).encode()
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(address)
    deaf.sendall(b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    for client in (silent, slow, trickling, again):
        assert received(client) == b""
    stop.set()
    thread.join()
    assert list(server.stream(5))[-1]["end"] == "length"  # the others go on
    server.send(signal.SIGTERM)  # what the deaf client has asked for has been cancelled
    assert server.end() == "ended"
    for client in (silent, slow, trickling, again, deaf):
        client.close()


def test_connections_are_limited(start: Callable[..., Server]) -> None:
    server = start(options=ServerOptions(max_connections=3), engine={"pause": 0.01, "slots": 8})
    streams = [server.stream(10**6) for _ in range(3)]
    for each in streams:
        next(each)

    def ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return server.ready() == 200
        return False

    assert not ready()  # the connection is closed without an answer
    streams[0].close()  # type: ignore[attr-defined]
    server.until(ready)


def test_headers_are_limited(start: Callable[..., Server]) -> None:
    server = start()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        # Hardly more than the limit: the server takes all of it, so closing does not lose its answer.
        client.sendall(b"GET /ready HTTP/1.1\r\nX-Header: " + b"a" * MAX_HEADER_BYTES)
        status, _, rest = received(client).partition(b"\r\n")
    assert status.startswith(b"HTTP/1.1 400 ") and b'"invalid_request_error"' in rest
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /ready HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 405 ")  # before the body has come
        client.sendall(b"no length\r\n")
        received(client)
    assert server.ready() == 200 and "Traceback" not in server.said()


class Buffer(asyncio.Transport):
    """A connection with bytes that wait to be sent."""

    left, aborted = 3 * connection.WRITE_BYTES, False

    def get_write_buffer_size(self) -> int:
        return self.left

    def abort(self) -> None:
        self.aborted = True


def test_a_client_may_take_its_time_for_a_long_response() -> None:
    loop, transport = Mock(), Buffer()
    client = connection.ClientConnection(uvicorn.Config(Mock(), log_config=None), ServerState(), {}, loop)
    client.connection_made(transport)
    client.pause_writing()
    for taken, aborted in ((connection.WRITE_BYTES, False), (connection.WRITE_BYTES - 1, True)):
        transport.left -= taken
        seconds, check, *arguments = loop.call_later.call_args.args
        assert seconds == connection.WRITE_SECONDS
        check(*arguments)
        assert transport.aborted == aborted
