"""Ranks that die, hang or raise, as real processes: how the others end, when, and what is said."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ee.errors import UserError
from megatron_ee.parallel import watchdog
from megatron_ee.parallel.watchdog import watch_ranks
from megatron_ee.testing.ranks import Ranks

WORLD_SIZE = 3
TIMEOUT = 2.0
SLACK = 4.0
"""Seconds beyond the stated time: three processes share what this machine has."""


class Rank:
    """What a behaviour below works with, in its own process."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number, self.folder, self.step = number, folder, 0
        self.cleanup_seconds = 0.0

    def where(self) -> str:
        return f"stage {self.number}, step {self.step}"

    def work(self, steps: int = 1_000_000) -> None:
        for _ in range(steps):
            dist.all_reduce(torch.ones(1))
            self.step += 1
            if self.step == 5:
                (self.folder / f"running-{self.number}").touch()
            time.sleep(0.01)

    def work_then_block(self) -> None:
        """As a GPU's collective does: it neither returns nor fails."""
        self.work(5)
        time.sleep(1000)


def run_rank(folder: Path, behaviour: Callable[[Rank], None]) -> None:
    rank = Rank(int(os.environ["RANK"]), folder)
    os.dup2(os.open(folder / f"stderr-{rank.number}", os.O_WRONLY | os.O_CREAT), 2)
    dist.init_process_group("gloo")

    def on_failure(line: str) -> None:
        time.sleep(0.2)  # as a file system may take
        (folder / f"failure-{rank.number}").write_text(line)

    try:
        with watch_ranks(rank.number, WORLD_SIZE, TIMEOUT, rank.where, on_failure):
            behaviour(rank)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        time.sleep(rank.cleanup_seconds)
        os._exit(1)


class Run(Ranks):
    """Processes of one run, and how they ended."""

    def __init__(self, folder: Path, behaviour: Callable[[Rank], None]) -> None:
        super().__init__(WORLD_SIZE, run_rank, folder, behaviour)
        self.folder = folder

    def wait_until_running(self) -> None:
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("running-*"))) < WORLD_SIZE:
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)
        time.sleep(2 * watchdog.BEAT_SECONDS * min(1.0, TIMEOUT / 4))  # for their step to be known

    def signal(self, number: int, what: signal.Signals) -> None:
        os.kill(self.processes[number].pid, what)

    def statuses(self, *numbers: int, within: float) -> list[int | None]:
        deadline = time.monotonic() + within
        for number in numbers:
            self.processes[number].join(max(0.0, deadline - time.monotonic()))
        return [self.processes[number].exitcode for number in numbers]

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("stderr-*")))

    def errors(self) -> list[str]:
        return re.findall(r"^error: .*$", self.output(), flags=re.MULTILINE)

    def reported(self) -> list[str]:
        return [path.read_text() for path in self.folder.glob("failure-*")]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a behaviour on all ranks; no process is left over."""
    runs: list[Run] = []

    def start(behaviour: Callable[[Rank], None]) -> Run:
        runs.append(Run(tmp_path, behaviour))
        return runs[-1]

    yield start
    for run in runs:
        run.__exit__()


def others(rank: int) -> list[int]:
    return [number for number in range(WORLD_SIZE) if number != rank]


@pytest.mark.parametrize(
    ("lost", "behaviour"),
    [
        (1, Rank.work),
        pytest.param(0, Rank.work, marks=pytest.mark.slow),
        pytest.param(0, Rank.work_then_block, marks=pytest.mark.slow),
        pytest.param(1, Rank.work_then_block, marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_is_named_at_once(start: Any, lost: int, behaviour: Callable[[Rank], None]) -> None:
    run = start(behaviour)
    run.wait_until_running()
    run.signal(lost, signal.SIGKILL)
    assert run.statuses(*others(lost), within=SLACK) == [1, 1]
    [line] = run.errors()
    pattern = rf"error: rank {lost} \(stage {lost}, step [1-9]\d*\) is gone: it was killed or crashed; ending the run"
    assert re.fullmatch(pattern, line)
    assert run.reported() == [line.removeprefix("error: ")]
    assert "Traceback" not in run.output()


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_frozen_rank_is_named_after_the_timeout(start: Any, lost: int) -> None:
    run = start(Rank.work)
    run.wait_until_running()
    stopped = time.monotonic()
    run.signal(lost, signal.SIGSTOP)
    assert run.statuses(*others(lost), within=TIMEOUT + SLACK) == [1, 1]
    assert time.monotonic() - stopped > TIMEOUT - 1
    [line] = run.errors()
    pattern = rf"error: rank {lost} \(stage {lost}, step [1-9]\d*\) has not responded for 2 s; ending the run"
    assert re.fullmatch(pattern, line)
    assert run.reported() == [line.removeprefix("error: ")]
    # Thawed, it finds that the run is over.
    run.signal(lost, signal.SIGCONT)
    assert run.statuses(lost, within=SLACK) == [1]


@pytest.mark.slow
def test_a_run_that_is_frozen_as_a_whole_goes_on(start: Any) -> None:
    run = start(Rank.work)
    run.wait_until_running()
    for what, seconds in ((signal.SIGSTOP, TIMEOUT + 1), (signal.SIGCONT, 1.0)):
        for number in range(WORLD_SIZE):
            run.signal(number, what)
        time.sleep(seconds)
    assert run.statuses(0, 1, 2, within=0) == [None, None, None]
    assert run.output() == ""


def rank_0_raises(rank: Rank) -> None:
    rank.work(7)
    if rank.number == 0:
        raise UserError("corpus/wiki ends\nafter 7 steps")
    rank.work()


def rank_2_raises(rank: Rank) -> None:
    rank.work(7)
    if rank.number == 2:
        raise KeyError("exit 8")
    rank.work_then_block()


@pytest.mark.parametrize(
    ("behaviour", "line"),
    [
        (rank_0_raises, "rank 0 (stage 0, step 7): corpus/wiki ends after 7 steps"),
        (rank_2_raises, "rank 2 (stage 2, step 7): KeyError('exit 8')"),
    ],
)
def test_a_rank_that_raises_ends_all(start: Any, behaviour: Callable[[Rank], None], line: str) -> None:
    run = start(behaviour)
    run.wait_until_running()
    assert run.statuses(0, 1, 2, within=SLACK) == [1, 1, 1]
    assert run.errors() == [f"error: {line}"]
    assert run.reported() == [line]
    assert run.output().count("Traceback") == 1


def cleanup_hangs(rank: Rank) -> None:
    watchdog.GRACE_SECONDS = 1.0
    rank.work(5)
    if rank.number == 1:
        rank.cleanup_seconds = 1000.0
        raise UserError("no space left")
    rank.work()


@pytest.mark.slow
def test_a_rank_that_raises_ends_even_if_its_cleanup_hangs(start: Any) -> None:
    run = start(cleanup_hangs)
    assert run.statuses(0, 1, 2, within=60) == [1, 1, 1]
    assert run.errors() == ["error: rank 1 (stage 1, step 5): no space left"]


def all_raise(rank: Rank) -> None:
    rank.work(5)
    time.sleep(0.3 * rank.number)
    error = UserError("model.path: no such directory")
    error.common = True
    raise error


def test_what_all_ranks_raise_is_left_to_them(start: Any) -> None:
    run = start(all_raise)
    assert run.statuses(0, 1, 2, within=60) == [1, 1, 1]
    assert run.output().count("Traceback") == 3
    assert (run.errors(), run.reported()) == ([], [])


def collective_failed() -> UserError:
    error = UserError("the step failed")
    error.__cause__ = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:4711.")
    return error


def collectives_fail_first(rank: Rank) -> None:
    rank.work(5)
    if rank.number < 2:
        raise collective_failed()
    time.sleep(0.7)
    raise UserError("the disk is full")


def test_a_failed_collective_is_not_its_ranks_fault(start: Any) -> None:
    run = start(collectives_fail_first)
    assert run.statuses(0, 1, 2, within=60) == [1, 1, 1]
    assert run.errors() == ["error: rank 2 (stage 2, step 5): the disk is full"]
    assert run.output().count("Traceback") == 1


def collective_fails_alone(rank: Rank) -> None:
    watchdog.BLAME_SECONDS = 0.5
    rank.work(5)
    if rank.number == 1:
        raise collective_failed()
    rank.work_then_block()


@pytest.mark.slow
def test_a_failed_collective_is_its_ranks_fault_if_no_other_is_lost(start: Any) -> None:
    run = start(collective_fails_alone)
    assert run.statuses(0, 1, 2, within=60) == [1, 1, 1]
    assert run.errors() == ["error: rank 1 (stage 1, step 5): the step failed"]


def ends_in_turn(rank: Rank) -> None:
    rank.work(5)
    time.sleep(1.5 * rank.number)


@pytest.mark.slow
def test_ranks_may_finish_at_different_times(start: Any) -> None:
    run = start(ends_in_turn)
    run.wait_until_running()
    assert run.statuses(0, 1, 2, within=3.0 + SLACK) == [0, 0, 0]
    assert run.output() == ""


def only_the_last_goes_on(rank: Rank) -> None:
    rank.work(5)
    if rank.number == 2:
        time.sleep(1000)


@pytest.mark.slow
def test_rank_0_still_watches_when_it_has_finished(start: Any) -> None:
    run = start(only_the_last_goes_on)
    run.wait_until_running()
    assert run.statuses(1, within=SLACK) == [0]
    run.signal(2, signal.SIGKILL)
    assert run.statuses(0, within=SLACK) == [1]
    assert run.errors() == ["error: rank 2 (stage 2, step 5) is gone: it was killed or crashed; ending the run"]


def strangers_connect(rank: Rank) -> None:
    if rank.number == 1:
        port = int(dist.group.WORLD.get_group_store().get(watchdog.STORE_KEY).split()[0])
        for sent in (b"GET / HTTP/1.1\r\n\r\n", b"hello 0123 2\n", b"done\n", b"\xff\x00" * 70_000, b""):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(sent)
                time.sleep(0.1)
    rank.work(20)


@pytest.mark.slow
def test_foreign_connections_to_the_watchdog_change_nothing(start: Any) -> None:
    run = start(strangers_connect)
    assert run.statuses(0, 1, 2, within=60) == [0, 0, 0]
    assert run.output() == ""


def test_a_single_rank_is_not_watched() -> None:
    before = threading.active_count()
    with watch_ranks(0, 1, 60.0, lambda: "stage 0, step 0"):
        assert threading.active_count() == before
