"""A child process that does one thing at a time when told to, so that each side has its own peak memory."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from typing import Any

from megatron_ee.children import follow
from megatron_ee.errors import UserError

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


BUSY = 0.25
"""Load per core, before anything is measured, from which on results are doubtful."""


def quiet_enough() -> float:
    """The load of the last minute (running processes); says so on stderr where others keep the machine busy."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY * cores:
        print(f"the machine is busy (load {load:.1f} on {cores} cores): do not trust these figures", file=sys.stderr)
    return load


class Worker:
    """Calls the methods of an object that lives in the child; between calls the child waits and costs nothing.

    Attributes:
        connection: where its answers arrive.
    """

    def __init__(self, name: str, connection: Connection, process: Any) -> None:
        self._name, self.connection, self._process = name, connection, process

    def call(self, method: str, *arguments: Any) -> Any:
        """Run ``method`` in the child, wait for it, and return what it returns.

        Raises:
            UserError: it raised one, or the child is gone.
            RuntimeError: it raised anything else; holds the child's traceback.
        """
        self.send(method, *arguments)
        return self.receive()

    def send(self, method: str, *arguments: Any) -> None:
        """Let the child start on ``method``. Raises UserError if it is gone."""
        try:
            self.connection.send((method, arguments))
        except ConnectionError:
            raise self._gone() from None

    def receive(self) -> Any:
        """Wait for the child's answer. Raises as ``call``."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._gone() from None
        if kind == "user error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"in the process of {self._name}:\n{value}")
        return value

    def _gone(self) -> UserError:
        self._process.join(10)
        return UserError(
            f"the process of {self._name} ended with status {self._process.exitcode}; "
            "if it ran out of memory, choose a smaller model or fewer exits"
        )


def call_all(workers: Sequence[Worker], method: str, *arguments: Any) -> list[Any]:
    """``Worker.call`` in all of them at the same time; raises as soon as one of them fails."""
    for worker in workers:
        worker.send(method, *arguments)
    waiting, answers = {worker.connection: worker for worker in workers}, {}
    while waiting:
        for connection in connections.wait(list(waiting)):
            worker = waiting.pop(connection)  # type: ignore[call-overload]
            answers[worker] = worker.receive()
    return [answers[worker] for worker in workers]


@contextlib.contextmanager
def start_worker(name: str, make: str, *arguments: Any, wait: bool = True, alone: bool = False) -> Iterator[Worker]:
    """Start a child that holds the object which ``make(*arguments)`` yields; end it with the context.

    The child starts from nothing (no fork), and this process should be small: Linux counts the memory of the process
    that starts another towards the other's peak.

    Args:
        name: of the side, for messages.
        make: ``module:function`` of a context manager, by name, so that only the child imports its module.
        wait: until the object is made; otherwise the first call does.
        alone: no other child computes at the same time, so that its threads may spin where they wait, as a user's do:
            a token takes hundreds of short products, and waking threads for each costs several times their time.

    Raises:
        UserError: ``make`` raised one, or the child is gone.
        RuntimeError: ``make`` raised anything else.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make, arguments, alone), daemon=True)
    process.start()
    theirs.close()
    worker = Worker(name, ours, process)
    try:
        if wait:
            worker.call("")  # nothing, once the object is made
        yield worker
    finally:
        ours.close()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(connection: Connection, make: str, arguments: tuple[Any, ...], alone: bool) -> None:
    """The child: make the object, then answer calls until the other end closes."""
    follow(multiprocessing.parent_process())
    for variable in _LAUNCHER:  # a world of its own, whoever started the parent
        os.environ.pop(variable, None)
    # Threads sleep where they wait, in every child alike. By default GNU OpenMP's spin, but much less in a process that
    # once had more of them than cores: on a busy machine that alone made one side 10 times slower than the other.
    if not alone:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    module, function = make.split(":")
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            made: AbstractContextManager[Any] = getattr(importlib.import_module(module), function)(*arguments)
            with made as subject:
                _answer(connection, subject)
        except UserError as error:
            connection.send(("user error", str(error)))
        except (EOFError, ConnectionError):
            raise
        except Exception:
            connection.send(("error", traceback.format_exc()))


def _answer(connection: Connection, subject: Any) -> None:
    while True:
        method, arguments = connection.recv()
        connection.send(("result", getattr(subject, method)(*arguments) if method else None))
