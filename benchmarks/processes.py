"""Other processes: commands that run to their end, and sides of a comparison that answer one call at a time.

A side in a process of its own has its own peak memory. This module imports no torch: Linux counts the memory of the
process that starts another towards the other's peak.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """Processes that ran together to their end.

    Attributes:
        seconds: from start to end.
        peak_memory: bytes resident at each one's peak.
        output: what the first one wrote to stdout.
    """

    seconds: float
    peak_memory: list[int]
    output: str


def megatron_ee_command(*arguments: str) -> list[str]:
    """The command line of ``megatron-ee`` from this checkout."""
    return [sys.executable, "-m", "megatron_ee", *arguments]


def run_processes(arguments: Sequence[str], *, ranks: int = 1, **changes: str) -> Ended:
    """Run a command, as so many ranks of one run, with ``changes`` of the environment.

    Raises:
        UserError: one of them failed; says what it wrote last.
    """
    port = free_port()
    processes = []
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        for rank in range(ranks):
            launched = dict(zip(LAUNCHER, map(str, [rank, rank, ranks, "127.0.0.1", port]), strict=True))
            environment = child_environment(**(launched if ranks > 1 else {}))
            stdout = output if rank == 0 else subprocess.DEVNULL
            processes.append(
                subprocess.Popen(arguments, cwd=ROOT, env={**environment, **changes}, stdout=stdout, stderr=errors)
            )
        ends = [os.wait4(process.pid, 0)[1:] for process in processes]
        seconds = time.perf_counter() - started
        for process, (status, _) in zip(processes, ends, strict=True):
            process.returncode = os.waitstatus_to_exitcode(status)
        if any(process.returncode for process in processes):
            errors.seek(0)
            raise UserError(f"{' '.join(arguments)[:100]} failed: {errors.read().strip()[-2000:]}")
        output.seek(0)
        return Ended(seconds, [usage.ru_maxrss * 1024 for _, usage in ends], output.read())


class Side:
    """A child process that holds an object and calls its methods; between calls it waits and costs nothing."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """``name``: of an entry of ``benchmarks.sides.SIDES``, which is called with ``settings`` in the child."""
        self._name = name
        # Threads sleep where they wait: those of one side would else spin while another one computes.
        environment = child_environment(OMP_WAIT_POLICY=os.environ.get("OMP_WAIT_POLICY", "passive"))
        arguments = [sys.executable, "-m", "benchmarks.sides", name, json.dumps(settings)]
        self._process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def call(self, method: str) -> Any:
        """Run a method without arguments in the child, and return what it returns. Raises UserError if it fails."""
        self.start(method)
        return self.finish()

    def start(self, method: str) -> None:
        """Let the child start on a method."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # ``finish`` says that it is gone
            self._process.stdin.write(f"{method}\n")
            self._process.stdin.flush()

    def finish(self) -> Any:
        """Wait for what it returns."""
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise UserError(f"the process of {self._name} ended with status {self._process.wait()}; its error is above")
        return json.loads(answer)


def serve(make: Callable[..., AbstractContextManager[Any]], settings: Mapping[str, Any]) -> None:
    """In the child: make the object, then answer calls until the parent is gone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    with make(**settings) as subject:
        for method in _lines():
            print(json.dumps(getattr(subject, method)()), file=answers, flush=True)


def _lines() -> Iterator[str]:
    while line := sys.stdin.readline():
        yield line.strip()


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def child_environment(**changes: str) -> dict[str, str]:
    """This process's, without what a launcher told it; this checkout is found, and no hub is asked."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, **changes}
