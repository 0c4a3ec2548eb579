"""``megatron-ee`` in a separate process that starts quickly."""

from __future__ import annotations

import multiprocessing  # noqa: TID251  with the process it starts
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_ee.testing.ranks import PRELOADED


class Command:
    """A running ``megatron-ee``, forked from the server of ``Ranks``, which saves seconds of imports.

    Attributes:
        pid: process id.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._arguments = arguments
        self._directory = Path(tempfile.mkdtemp())
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._process = context.Process(target=_run, args=(arguments, environment, str(self._directory)))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Wait for the process; returns its status (negative for a signal) and output.

        Raises:
            AssertionError: it does not end within ``timeout`` seconds.
        """
        self._process.join(timeout)
        status = self._process.exitcode
        output, errors = ((self._directory / name).read_text() for name in ("stdout", "stderr"))
        assert status is not None, f"no end within {timeout:.0f} s: {errors}"
        return subprocess.CompletedProcess(self._arguments, status, output, errors)


def _run(arguments: list[str], environment: dict[str, str], directory: str) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ |= environment
    from megatron_ee.commands.main import main

    sys.exit(main(arguments))
