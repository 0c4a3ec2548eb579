"""Runs a function on several gloo ranks, in one process each."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing  # noqa: TID251  with the processes it starts
import os
import secrets
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection  # noqa: TID251  with the processes it starts
from typing import Any

LEAVING = 10.0  # seconds for a rank to end after its answer; if it is killed, its child processes stay
PRELOADED = ("torch", "megatron_ee.tuning.run", "megatron_ee.evaluation.evaluate", "megatron_ee.testing.models")


class Ranks:
    """Processes that each run a function, with the environment that torchrun sets.

    They are forked from a server that has already imported megatron-core, so they start quickly.

    Attributes:
        processes: in order of rank.
    """

    def __init__(self, world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 900) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._timeout, port = timeout, free_port()
        self.processes, self._pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(theirs, rank, world_size, port, timeout, function, arguments))
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def results(self) -> list[Any]:
        """Wait for all ranks and return their results.

        Raises:
            AssertionError: a rank raised (with its traceback), died, or took too long.
        """
        answers: list[tuple[bool, Any]] = []
        for pipe in self._pipes:
            # After one rank has failed, the others fail soon, with their own messages.
            answers.append(_answer(pipe, self._timeout if all(good for good, _ in answers) else 5))
        problems = [f"rank {rank}:\n{value}" for rank, (good, value) in enumerate(answers) if not good]
        assert not problems, "\n".join(problems)
        for process in self.processes:
            process.join(LEAVING)
        return [value for _, value in answers]


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 900) -> list[Any]:
    """Run ``function(*arguments)`` on every rank; returns the results in order of rank.

    Raises:
        AssertionError: a rank raised, died, or took longer than ``timeout`` seconds.
    """
    with Ranks(world_size, function, *arguments, timeout=timeout) as ranks:
        return ranks.results()


def run_command(arguments: list[str], environment: dict[str, str], stderr: str) -> int:
    """Run ``megatron-ee`` on one rank and return its exit status. stderr goes to ``stderr-RANK``."""
    from megatron_ee.commands.main import main

    os.environ |= {**environment, **{name: os.environ[name] for name in ("OMP_NUM_THREADS", "MASTER_PORT")}}
    os.dup2(os.open(f"{stderr}-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    return main(arguments)


def free_port() -> int:
    """A TCP port that nothing listens on.

    It is below those that Linux gives to sockets by itself: before it is used, other ranks open many of these.
    """
    while True:
        port = 15_000 + secrets.randbelow(17_000)  # not ``random``, which tests seed
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def _run(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(0.9 * timeout)  # shows where a rank hangs
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",  # gloo also on a machine with GPUs
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _answer(pipe: Connection, timeout: float) -> tuple[bool, Any]:
    if not pipe.poll(timeout):
        return False, f"no result within {timeout:.0f} s"
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except EOFError:
        return False, "died"
