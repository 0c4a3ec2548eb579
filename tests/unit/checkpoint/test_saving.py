"""Saves in the background: what they hold, when they fail, and kill -9 at every failpoint of a real process."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee.checkpoint import failpoints, saving
from megatron_ee.checkpoint.atomic import (
    LOCK_NAME,
    current_directory,
    numbered_directories,
    prune,
    replace_directory,
    writer_lock,
)
from megatron_ee.checkpoint.failpoints import failpoint
from megatron_ee.checkpoint.resume import load_latest
from megatron_ee.checkpoint.saving import Saver
from megatron_ee.checkpoint.store import open_checkpoint
from megatron_ee.checkpoint.writing import Piece, whole, write_checkpoint
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.testing.project import ROOT, saved_tensors
from megatron_ee.testing.ranks import Ranks

STEPS = 4  # of the script that is killed


def tensors(value: float) -> dict[str, Tensor]:
    """Several shapes, dtypes and strides, all of one value."""
    return {
        "w": torch.full((300, 200), value),
        "turned": torch.full((40, 30), value).T,
        "half": torch.full((77,), value, dtype=torch.bfloat16),
        "count": torch.tensor(int(value)),
        "empty": torch.empty(0, 3),
    }


def pieces(value: float) -> list[Piece]:
    return [whole(key, tensor) for key, tensor in tensors(value).items()]


def assert_holds(path: Path, value: float) -> None:
    saved, expected = saved_tensors(path), tensors(value)
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        assert saved[key].dtype == tensor.dtype and torch.equal(saved[key], tensor), key


class Gate:
    """Holds writing up until it is opened, and counts who writes at the same time."""

    def __init__(self) -> None:
        self.open, self.threads = threading.Event(), list[threading.Thread]()
        self.inside = self.most = 0

    def write(self, *arguments: Any, **options: Any) -> None:
        self.threads.append(threading.current_thread())
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.open.wait(30)
        write_checkpoint(*arguments, **options)
        self.inside -= 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(saving, "write_checkpoint", gate.write)
    yield gate
    gate.open.set()


def test_holds_what_was_there_when_it_was_called(tmp_path: Path, gate: Gate) -> None:
    given, order = pieces(1), []
    with Saver() as saver:
        started = time.perf_counter()
        saver.save(tmp_path / "step-1", iter(given), {"n": 1}, lambda: order.append((tmp_path / "step-1").is_dir()))
        returned = time.perf_counter() - started
        assert not (tmp_path / "step-1").exists() and saver.finished() == []
        for piece in given:  # tuning goes on
            piece.tensor.fill_(7)
        saver.check()
        gate.open.set()
    assert_holds(tmp_path / "step-1", 1)
    assert open_checkpoint(tmp_path / "step-1").metadata == {"n": 1}
    assert order == [True]
    (times,) = saver.finished()
    assert times.final == tmp_path / "step-1" and saver.finished() == []
    assert 0 < times.stopped <= returned and times.writing > 0


def test_the_copy_is_kept_from_save_to_save(tmp_path: Path) -> None:
    with Saver() as saver:
        places = []
        for step in (1, 2, 3):
            saver.save(tmp_path / f"step-{step}", pieces(step), {})
            places.append((saver._buffer.data_ptr(), saver._buffer.numel()))
        saver.save(tmp_path / "step-4", [whole("larger", torch.ones(2 * places[0][1]))], {})
        assert len(set(places)) == 1 and saver._buffer.numel() > places[0][1]
    for step in (1, 2, 3):
        assert_holds(tmp_path / f"step-{step}", step)
    assert torch.equal(saved_tensors(tmp_path / "step-4")["larger"], torch.ones(2 * places[0][1]))


def test_one_save_at_a_time(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "NOTICEABLE", 0.05)
    lines: list[str] = []
    with Saver(report=lines.append) as saver:
        saver.save(tmp_path / "step-1", pieces(1), {})
        threading.Timer(0.2, gate.open.set).start()
        saver.save(tmp_path / "step-2", pieces(2), {})
        assert_holds(tmp_path / "step-1", 1)
    assert_holds(tmp_path / "step-2", 2)
    assert gate.most == 1
    assert len(lines) == 1 and "step-2: waited" in lines[0]
    first, second = saver.finished()
    assert first.stopped < second.stopped and second.stopped > 0.1


@pytest.mark.parametrize("saver, wait", [(Saver(asynchronous=False), False), (Saver(), True)])
def test_a_save_in_the_foreground_copies_nothing(tmp_path: Path, gate: Gate, saver: Saver, wait: bool) -> None:
    gate.open.set()
    saver.save(tmp_path / "step-1", pieces(1), {}, wait=wait)
    assert_holds(tmp_path / "step-1", 1)
    assert gate.threads == [threading.current_thread()] and saver._buffer.numel() == 0
    (times,) = saver.finished()
    assert times.stopped >= times.writing > 0


def spoiled(path: Path) -> Path:
    """A place where nothing can be saved."""
    path.mkdir()
    (path / "something").touch()
    return path


def until_failed(saver: Saver) -> None:
    end = time.monotonic() + 30
    while saver.failure is None:
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("noticed", ["check", "wait", "save", "close"])
def test_a_failure_is_raised_once_at_the_next_occasion(tmp_path: Path, noticed: str) -> None:
    saver = Saver()
    saver.check()
    saver.save(spoiled(tmp_path / "step-1"), pieces(1), {})
    until_failed(saver)
    occasions: dict[str, Callable[[], None]] = {
        "check": saver.check,
        "wait": saver.wait,
        "save": lambda: saver.save(tmp_path / "step-2", pieces(2), {}),
        "close": lambda: saver.__exit__(None, None, None),
    }
    assert saver.finished() == []
    with pytest.raises(CheckpointError, match="step-1: exists already"):
        occasions[noticed]()
    assert saver.failure is None and sorted(os.listdir(tmp_path)) == ["step-1"]
    saver.save(tmp_path / "step-3", pieces(3), {})
    saver.wait()
    assert_holds(tmp_path / "step-3", 3)


def test_another_ranks_failure_is_raised_here_too(tmp_path: Path) -> None:
    saver = Saver()
    saver.save(tmp_path / "step-1", pieces(1), {})
    saver.check([None, None])
    with pytest.raises(CheckpointError, match="rank 1: it broke") as caught:
        saver.check([None, "it broke"])
    assert caught.value.common
    assert_holds(tmp_path / "step-1", 1)


def test_a_failure_after_a_save_is_raised(tmp_path: Path) -> None:
    def fail() -> None:
        raise CheckpointError("the adapter cannot be written")

    saver = Saver()
    saver.save(tmp_path / "step-1", pieces(1), {}, fail)
    with pytest.raises(CheckpointError, match="the adapter"):
        saver.wait()
    assert_holds(tmp_path / "step-1", 1)


def test_an_error_elsewhere_lets_the_save_finish(tmp_path: Path, gate: Gate) -> None:
    threading.Timer(0.1, gate.open.set).start()
    with pytest.raises(ZeroDivisionError), Saver() as saver:
        saver.save(tmp_path / "step-1", pieces(1), {})
        raise ZeroDivisionError
    assert_holds(tmp_path / "step-1", 1)
    lines: list[str] = []
    with pytest.raises(ZeroDivisionError), Saver(report=lines.append) as saver:
        saver.save(spoiled(tmp_path / "step-2"), pieces(1), {})
        raise ZeroDivisionError
    assert len(lines) == 1 and "step-2: exists already" in lines[0]


def test_an_interrupt_does_not_wait(tmp_path: Path, gate: Gate) -> None:
    with pytest.raises(KeyboardInterrupt), Saver() as saver:
        saver.save(tmp_path / "step-1", pieces(1), {})
        raise KeyboardInterrupt
    assert not (tmp_path / "step-1").exists()
    gate.open.set()
    saver.wait()


@pytest.mark.gpu
def test_from_a_device(tmp_path: Path) -> None:
    given = [Piece(piece.key, piece.global_shape, piece.offset, piece.tensor.cuda()) for piece in pieces(1)]
    with Saver() as saver:
        saver.save(tmp_path / "step-1", given, {})
        assert saver._buffer.is_pinned()
        for piece in given:
            piece.tensor.fill_(7)
    assert_holds(tmp_path / "step-1", 1)


# ----------------------------------------------------------------------------------------------------- failpoints


def test_the_names_of_failpoints_are_those_in_the_code() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "megatron_ee").rglob("*.py"))
    assert sorted(set(re.findall(r'failpoint\("([^"]*)"\)', sources))) == sorted(failpoints.NAMES)


@pytest.mark.parametrize("value", ["save.nothing", "save.begin:x", "save.begin:-1", "save"])
def test_an_unknown_failpoint_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, value)
    with pytest.raises(ConfigError, match=re.escape(f"MEGATRON_EE_FAILPOINT: unknown failpoint '{value}'")):
        failpoint("save.begin")


def save_and_save(output: Path, point: str, asynchronous: bool) -> None:
    """What a run does, over and over: a checkpoint, pruning, a directory that is replaced."""
    os.environ[failpoints.VARIABLE] = point
    parent = output / "checkpoints"
    with writer_lock(output), Saver(asynchronous) as saver:
        for step in range(1, STEPS + 1):

            def then(step: int = step) -> None:
                prune(parent, 2)
                with replace_directory(output / "adapter") as directory:
                    (directory / "step").write_text(str(step))

            saver.save(parent / f"step-{step}", pieces(step), {"step": step}, then)


# Failpoint and at which count it kills in the third save; the checkpoints that are there then, the adapter that is read
# then, and the one that the next run finds.
KILLED = {
    "save.thread:3": ([1, 2], 2, 2),
    "save.begin:3": ([1, 2], 2, 2),
    "save.begun:3": ([1, 2], 2, 2),
    "save.shard:15": ([1, 2], 2, 2),  # each save is a header and five tensors
    "save.shard-done:3": ([1, 2], 2, 2),
    "save.manifest:3": ([1, 2], 2, 2),
    "save.manifest-done:3": ([1, 2], 2, 2),
    "save.renamed:3": ([1, 2, 3], 2, 2),
    "prune.renamed:1": ([2, 3], 2, 2),
    "replace.ready:3": ([2, 3], 2, 3),
    "replace.between:3": ([2, 3], 3, 3),
}


def test_every_failpoint_of_a_save_is_tried() -> None:
    tried = {point.partition(":")[0] for point in KILLED}
    assert tried == {name for name in failpoints.NAMES if not name.startswith("convert.")}


@pytest.mark.parametrize(
    "point, asynchronous",
    [
        (point, asynchronous)
        for point in KILLED
        for asynchronous in (True, False)
        if asynchronous or "thread" not in point
    ],
)
def test_kill_9_at_every_failpoint_leaves_only_whole_checkpoints(
    tmp_path: Path, point: str, asynchronous: bool
) -> None:
    steps, adapter, recovered = KILLED[point]
    with Ranks(1, save_and_save, tmp_path, point, asynchronous, timeout=60) as ranks:
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode == -signal.SIGKILL
    parent = tmp_path / "checkpoints"
    assert [step for step, _ in numbered_directories(parent)] == steps
    for step, path in numbered_directories(parent):
        assert_holds(path, step)
    assert load_latest(parent, lambda checkpoint: checkpoint.metadata["step"], pytest.fail) == steps[-1]
    assert int((current_directory(tmp_path / "adapter") / "step").read_text()) == adapter
    with writer_lock(tmp_path):  # the next run
        assert sorted(os.listdir(parent)) == [f"step-{step}" for step in steps]
        assert sorted(os.listdir(tmp_path)) == [LOCK_NAME, "adapter", "checkpoints"]
        assert int((tmp_path / "adapter" / "step").read_text()) == recovered
        with Saver(asynchronous) as saver:
            saver.save(parent / "step-4", pieces(4), {})
    assert_holds(parent / "step-4", 4)


def test_an_unset_failpoint_kills_nothing(tmp_path: Path) -> None:
    with Ranks(1, save_and_save, tmp_path, "", True, timeout=60) as ranks:
        assert ranks.results() == [None]
    assert [step for step, _ in numbered_directories(tmp_path / "checkpoints")] == [STEPS - 1, STEPS]
    assert json.loads((tmp_path / "adapter" / "step").read_text()) == STEPS
