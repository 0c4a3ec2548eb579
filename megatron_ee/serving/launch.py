"""Loads a model on all ranks, and serves it on the first one until a signal or a failure."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from megatron_ee.inference.loading import open_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.released import Released
from megatron_ee.parallel.groups import launched_rank
from megatron_ee.serving.engine_loop import EngineFailed, EngineLoop, EngineLost, LoopLimits
from megatron_ee.serving.server import STOP_SIGNALS, ServedApp, ServerOptions, listen, run_server


def serve_model(
    released: Released,
    options: EngineOptions,
    host: str,
    port: int,
    make_app: Callable[[EngineLoop], ServedApp] | None,
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
        make_app: gives the application that answers requests with the loop. Not used on other ranks than the first.
        limits: of the loop.
        server: options of the server.

    Raises:
        ConfigError: the address cannot be taken, or an option does not fit the model.
        CheckpointError: the model cannot be read.
        EngineLost: the engine failed.
    """
    if launched_rank() > 0:
        with _without_signals(), open_engine(released, options):
            return
    loops: list[EngineLoop] = []

    def on_failure(line: str) -> None:
        for each in loops:
            each.lose(line)

    with listen(host, port) as listener:
        try:
            with open_engine(released, options, on_failure=on_failure) as engine:
                assert engine is not None and make_app is not None, "the first rank has the engine"
                loops.append(EngineLoop(engine, limits))
                run_server(make_app(loops[0]), loops[0], listener, server)
        except EngineFailed as error:
            raise EngineLost(str(error)) from error


@contextlib.contextmanager
def _without_signals() -> Iterator[None]:
    """Ignore the signals of the server. If the first rank ends, the watchdog ends this one."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (*STOP_SIGNALS, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
