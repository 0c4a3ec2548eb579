"""Loads a model on all ranks, and serves it on the first one until a signal or a failure."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

from megatron_ee.inference.loading import open_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.released import Released
from megatron_ee.parallel.groups import launched_rank
from megatron_ee.serving.engine_loop import EngineDead, EngineFailed, EngineLoop, LoopLimits
from megatron_ee.serving.server import STOP_SIGNALS, ServedApp, ServerOptions, listen, run_server

MakeApp = Callable[[EngineLoop], ServedApp]
"""Gives the application that answers requests with the loop."""


def serve_model(
    released: Released,
    options: EngineOptions,
    host: str,
    port: int,
    open_app: Callable[[], MakeApp],
    *,
    limits: LoopLimits,
    server: ServerOptions,
) -> None:
    """Serve a model. Every rank calls this.

    A signal to stop may go to every rank, as torchrun sends it: only the first one heeds it, and ends the others. If a
    rank is lost, the open requests end with an error, one line names the rank, and the processes end with status 1.

    Args:
        released: from ``open_released``.
        options: of the engine.
        host: where to listen; see ``check_address``.
        port: 0 for one that is free.
        open_app: called on the first rank before the model is loaded, such as to read files that only this rank has.
            Gives the function that makes the application.
        limits: of the loop.
        server: options of the server.

    Raises:
        ConfigError: the address cannot be taken, an option does not fit the model, or as ``open_app``.
        CheckpointError: the model cannot be read.
        EngineDead: the engine failed.
    """
    if launched_rank() > 0:
        with _without_signals(), open_engine(released, options):
            return
    loops: list[EngineLoop] = []
    prepared: list[tuple[socket.socket, MakeApp]] = []

    def prepare() -> None:
        listener = closing.enter_context(listen(host, port))
        prepared.append((listener, open_app()))

    def on_failure(line: str) -> None:
        for each in loops:
            each.on_rank_lost(line)

    with contextlib.ExitStack() as closing:
        try:
            with open_engine(released, options, prepare=prepare, on_failure=on_failure) as engine:
                assert engine is not None, "the first rank has the engine"
                [(listener, make_app)] = prepared
                loops.append(EngineLoop(engine, limits))
                run_server(make_app(loops[0]), loops[0], listener, server)
        except EngineFailed as error:
            raise EngineDead(str(error)) from error


@contextlib.contextmanager
def _without_signals() -> Iterator[None]:
    """Ignore the signals of the server. If the first rank ends, the watchdog ends this one."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (*STOP_SIGNALS, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
