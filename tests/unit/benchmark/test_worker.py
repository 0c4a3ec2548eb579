"""A side in a process of its own: answers, errors, death, and that it starts from nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ee.benchmark.worker import start_worker
from megatron_ee.errors import UserError


class Subject:
    def __init__(self, start: int) -> None:
        self.value = start

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def process(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise ZeroDivisionError("a bug")

    def refuse(self) -> None:
        raise UserError("the file is not good")

    def wait(self) -> None:
        time.sleep(300)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def subject(start: int) -> Iterator[Subject]:
    if start < 0:
        raise UserError("start must not be negative")
    yield Subject(start)


HERE = f"{__name__}:subject"


def test_calls_reach_one_object_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with start_worker("it", HERE, 5) as worker:
        assert [worker.call("add", 2), worker.call("add", 3)] == [7, 10]
        pid = worker.call("process")
        assert pid != os.getpid()
        assert worker.call("environment", "RANK") is None
        assert worker.call("environment", "OMP_WAIT_POLICY") == "passive"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("refuse", UserError, "^the file is not good$"),
        ("fail", RuntimeError, "in the process of it:\n(.|\n)*ZeroDivisionError: a bug"),
        ("die", UserError, "the process of it ended with status -9; if it ran out of memory"),
    ],
)
def test_what_goes_wrong_there_is_told_here(method: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), start_worker("it", HERE, 0) as worker:
        worker.call(method)


def test_an_object_that_cannot_be_made() -> None:
    with pytest.raises(UserError, match="start must not be negative"), start_worker("it", HERE, -1):
        pass


def test_the_child_ends_with_the_context_whatever_happens() -> None:
    pids = []
    with pytest.raises(KeyError), start_worker("it", HERE, 0) as worker:
        pids.append(worker.call("process"))
        raise KeyError
    time.sleep(0.1)
    assert not os.path.exists(f"/proc/{pids[0]}") or sys.platform != "linux"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_child_ends_with_a_parent_that_is_killed_while_it_works() -> None:
    script = f"""
from megatron_ee.benchmark.worker import start_worker
with start_worker("it", {HERE!r}, 0) as worker:
    print(worker.call("process"), flush=True)
    worker.call("wait")
"""
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), *sys.path)))}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ | path)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
