"""The HTTP server as a process: where it listens, its limits of connections, its signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import ipaddress
import logging
import resource
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from megatron_ee.errors import ConfigError, UserError
from megatron_ee.serving.connection import ClientConnection
from megatron_ee.serving.console import say
from megatron_ee.serving.engine_loop import EngineLoop
from megatron_ee.serving.guard import LocalHosts

if TYPE_CHECKING:
    from starlette.types import ASGIApp

MAX_HEADER_BYTES = 2**16
"""Size of a request's line and headers."""
OTHER_FILES = 256
"""Files and sockets that the process may have open besides its clients' connections."""
FLUSH_SECONDS = 5
"""Seconds for the last parts of the responses, after all requests have ended."""
WATCHDOG_SECONDS = 10.0
"""Seconds after which the watchdog has ended the process, if a rank is lost."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SLURM can send SIGUSR1 ahead of the time limit."""


@dataclass(frozen=True)
class ServerOptions:
    """How the server meets its clients.

    Attributes:
        max_connections: open connections; further ones are closed without an answer.
        drain_seconds: seconds for the running requests after a signal to stop. torchrun kills its processes 30 s after
            it has passed on a signal.
        any_host: whether requests may name any host; see ``LocalHosts``.
    """

    max_connections: int = 1024
    drain_seconds: float = 20.0
    any_host: bool = False


async def _nothing() -> None:
    """Nothing is left to do."""


@dataclass(frozen=True)
class ServedApp:
    """An application, and what else the server asks of it.

    Attributes:
        app: answers the requests.
        reload: reads again what may change while the server runs. It keeps the old state if it raises a ``UserError``,
            which is printed.
        close: finishes what goes on after the responses, with the engine's loop still there.
    """

    app: ASGIApp
    reload: Callable[[], None] = lambda: None
    close: Callable[[], Awaitable[None]] = _nothing


def check_address(host: str, *, keys: bool) -> None:
    """Check where the server would listen.

    Args:
        host: address or name.
        keys: whether requests need an API key.

    Raises:
        ConfigError: the host has no address, or other machines can reach it and there are no keys.
    """
    local = all(ipaddress.ip_address(address).is_loopback for _, address in _addresses(host))
    if not local and not keys:
        raise ConfigError(
            f"--host: {host} can be reached from other machines; give the keys of its users with --api-key-file, or "
            "use 127.0.0.1"
        )


def listen(host: str, port: int) -> socket.socket:
    """Take an address, without accepting connections yet; so a port that is in use is noticed before a model is loaded.

    A port whose last server has just ended can be taken at once; one that another process has taken, but does not
    listen on yet, cannot.

    Raises:
        ConfigError: it cannot be taken.
    """
    family, address = _addresses(host)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        _bind(listener, (address, port))
    except OSError as error:
        listener.close()
        problem = f"cannot listen on {host}, port {port}: {error.strerror or error}"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(f"--port: {problem}; choose another") from None
        raise ConfigError(f"--host: {problem}; give an address of this machine") from None
    return listener


def _bind(listener: socket.socket, address: tuple[str, int]) -> None:
    """Bind a socket so that nobody else can bind the address before it listens.

    Linux lets several sockets with ``SO_REUSEADDR`` bind one address until one of them listens. So the option is set
    only to get past the connections of a server that has ended, and not kept.
    """
    try:
        listener.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _reuse_address(listener, True)
        listener.bind(address)
        _reuse_address(listener, False)


def _reuse_address(listener: socket.socket, reuse: bool) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)


def url(listener: socket.socket) -> str:
    """The address of a listener for a client."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(
    served: ServedApp, engine_loop: EngineLoop, listener: socket.socket, options: ServerOptions = ServerOptions()
) -> None:
    """Serve until a signal, or until the engine fails.

    SIGTERM, SIGINT and SIGUSR1 stop it: it takes no new requests, ends when the running ones have ended, and cancels
    those that take longer than ``drain_seconds``. A second signal cancels them at once. SIGHUP reloads.

    Args:
        served: answers the requests.
        engine_loop: not started yet; it has stopped when this returns or raises.
        listener: from ``listen``; it is closed.
        options: see there.

    Raises:
        EngineFailed: the engine failed. Every open request has been answered with an error.
    """
    asyncio.run(_serve(served, engine_loop, listener, options))


async def _serve(served: ServedApp, engine_loop: EngineLoop, listener: socket.socket, options: ServerOptions) -> None:
    stop, address = asyncio.Event(), url(listener)
    drains: list[asyncio.Task[bool]] = []

    def on_signal(number: int) -> None:
        if number == signal.SIGHUP:
            return _reload(served)
        if stop.is_set():
            say("cancels the running requests")
            drains.append(asyncio.create_task(engine_loop.drain(0)))
        stop.set()

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of writing to clients that have left
    server = _server(served.app, options)
    _allow_open_files(options.max_connections + OTHER_FILES)
    engine_loop.start()
    try:
        with _signals(on_signal):
            _reuse_address(listener, True)  # its connections inherit this, and so do not hold the port after its end
            serving = asyncio.create_task(server.serve([listener]))
            while not (server.started or serving.done()):
                await asyncio.sleep(0.01)
            say(f"listens on {address}")
            await _first(stop.wait(), engine_loop.ended(), asyncio.shield(serving))
            if stop.is_set() and not engine_loop.failed:
                say(f"ends when the running requests have ended, after at most {options.drain_seconds:g} s")
                await engine_loop.drain(options.drain_seconds)
            server.should_exit = True
            await serving
            await served.close()
    finally:
        if not engine_loop.failed:
            await engine_loop.stop()
    if engine_loop.rank_lost:
        await asyncio.sleep(WATCHDOG_SECONDS)  # which has said what happened
    if engine_loop.failure is not None:
        raise engine_loop.failure


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: they end the process before the requests have ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Leave the signals alone."""
        yield


def _server(app: ASGIApp, options: ServerOptions) -> _Server:
    if not options.any_host:
        app = LocalHosts(app)
    settings: dict[str, Any] = {
        "http": functools.partial(ClientConnection, max_connections=options.max_connections),
        "loop": "asyncio",
        "ws": "none",
        "log_config": None,
        "log_level": "error",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_graceful_shutdown": FLUSH_SECONDS,
        "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
    }
    return _Server(uvicorn.Config(app, **settings))


def _allow_open_files(number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


@contextlib.contextmanager
def _signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Call ``handler`` in the asyncio thread after a signal. Only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(handler, number)

    before = {number: signal.signal(number, on_signal) for number in (*STOP_SIGNALS, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


async def _first(*waits: Any) -> None:
    """Wait for one of several things. An exception of it is raised."""
    tasks = [asyncio.ensure_future(each) for each in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def _reload(served: ServedApp) -> None:
    try:
        served.reload()
    except UserError as error:
        say(f"reload failed: {error}; what could not be read stays as it was")
    else:
        say("has read its keys and rules again")


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host: {host} has no address: {error}; give an address of this machine") from None
    return [(family, str(address[0]).partition("%")[0]) for family, _, _, _, address in found]
