"""Directories that appear whole or not at all, one writer per output, and what killed writers leave."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ee.checkpoint.atomic import (
    LOCK_NAME,
    current_directory,
    mark_damaged,
    new_directory,
    new_file,
    numbered_directories,
    prune,
    replace_directory,
    storage_errors,
    write_file,
    writer_lock,
)
from megatron_ee.errors import CheckpointError


def names(directory: Path) -> list[str]:
    """Everything in a directory, sorted."""
    return sorted(os.listdir(directory))


def test_new_directory_appears_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "runs" / "step-1"
    with new_directory(final) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("1")
        assert re.fullmatch(r"step-1\.tmp-[0-9a-f]{8}", temporary.name)
        assert temporary.parent == final.parent
        assert not final.exists()
    assert names(final.parent) == ["step-1"]
    assert (final / "sub" / "x").read_text() == "1"


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_directory(tmp_path / "step-1") as temporary:
        (temporary / "x").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "step-1"
    final.mkdir()
    with new_directory(final) as temporary:  # an empty directory may be taken
        (temporary / "x").write_text("1")
    with pytest.raises(CheckpointError, match="step-1: exists already"), new_directory(final):
        pytest.fail("the body must not run")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file: exists already"), new_directory(tmp_path / "file"):
        pytest.fail("the body must not run")
    assert names(tmp_path) == ["file", "step-1"]


def test_nothing_is_overwritten_that_came_meanwhile(tmp_path: Path) -> None:
    final = tmp_path / "step-1"
    with pytest.raises(CheckpointError, match="exists already"), new_directory(final) as temporary:
        (temporary / "x").write_text("mine")
        final.mkdir()
        (final / "x").write_text("theirs")
    assert names(tmp_path) == ["step-1"]
    assert (final / "x").read_text() == "theirs"


def test_storage_errors_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.*: cannot create: "), new_directory(tmp_path / "file" / "step-1"):
        pytest.fail("the body must not run")
    with pytest.raises(CheckpointError, match="No space left on device; free some space"):  # noqa: SIM117
        with new_directory(tmp_path / "step-1"), open("/dev/full", "w") as full:
            full.write("x")
    assert names(tmp_path) == ["file"]
    with pytest.raises(CheckpointError, match=r"/data/x: cannot write: Read-only file system"):  # noqa: SIM117
        with storage_errors("/data", "write"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/x")
    with pytest.raises(BrokenPipeError), storage_errors("/data", "write"):
        raise BrokenPipeError


def test_new_file_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"old")
    with pytest.raises(RuntimeError), new_file(path) as fd:
        os.write(fd, b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.json"]


def put(directory: Path, content: str) -> None:
    """``replace_directory`` with one file."""
    with replace_directory(directory) as temporary:
        (temporary / "x").write_text(content)


def test_replace_directory(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    for content in ("first", "second", "third"):
        put(final, content)
        assert (final / "x").read_text() == content
        assert names(tmp_path) == ["adapter"]
    with pytest.raises(RuntimeError), replace_directory(final) as temporary:
        (temporary / "x").write_text("fourth")
        raise RuntimeError
    assert (final / "x").read_text() == "third"
    assert names(tmp_path) == ["adapter"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: is not a directory"):
        put(tmp_path / "file", "x")


# Stops for ever in the n-th rename of replace_directory, when it says so.
STOP_IN_RENAME = """
import os, sys, time
from pathlib import Path
from megatron_ee.checkpoint.atomic import replace_directory, writer_lock
rename, seen = os.rename, []
def stopping(source, target):
    seen.append(target)
    if len(seen) == int(sys.argv[2]):
        print("stopped", flush=True)
        time.sleep(60)
    rename(source, target)
os.rename = stopping
with writer_lock(Path(sys.argv[1]).parent), replace_directory(sys.argv[1]) as temporary:
    (temporary / "x").write_text("new")
"""


@pytest.mark.parametrize(
    ("rename", "read_then", "recovered"), [(1, "old", "old"), (2, "old", "new"), (3, "new", "new")]
)
def test_killed_in_a_replacement(tmp_path: Path, rename: int, read_then: str, recovered: str) -> None:
    final = tmp_path / "adapter"
    put(final, "old")
    kill_when_it_says_so([STOP_IN_RENAME, str(final), str(rename)])
    assert len(names(tmp_path)) > 2
    assert (current_directory(final) / "x").read_text() == read_then
    with writer_lock(tmp_path):
        assert names(tmp_path) == [LOCK_NAME, "adapter"]
        assert (final / "x").read_text() == recovered
    put(final, "newest")
    assert (current_directory(final) / "x").read_text() == "newest"


def kill_when_it_says_so(arguments: list[str]) -> None:
    """Run a script, and kill it with signal 9 after its first line."""
    with subprocess.Popen([sys.executable, "-c", *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
        assert line == "stopped\n"
        assert process.wait() == -signal.SIGKILL


def test_current_directory_of_nothing(tmp_path: Path) -> None:
    assert current_directory(tmp_path / "adapter") == tmp_path / "adapter"
    assert current_directory(tmp_path / "none" / "adapter") == tmp_path / "none" / "adapter"
    (tmp_path / "adapter-best.ready-01234567").mkdir()
    assert current_directory(tmp_path / "adapter") == tmp_path / "adapter"


def test_numbers_and_pruning(tmp_path: Path) -> None:
    for name in ("step-2", "step-10", "step-9", "step-9.damaged-01234567", "step-3.tmp-01234567", "step-x", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    (tmp_path / "step-99").write_text("a file")
    assert [number for number, _ in numbered_directories(tmp_path)] == [2, 9, 10]
    assert numbered_directories(tmp_path / "none") == []
    assert prune(tmp_path, keep=5) == []
    assert prune(tmp_path, keep=1) == [tmp_path / "step-2", tmp_path / "step-9"]
    assert [number for number, _ in numbered_directories(tmp_path)] == [10]
    assert (tmp_path / "step-9.damaged-01234567").is_dir()
    assert not [name for name in names(tmp_path) if name.startswith(".trash")]
    with pytest.raises(ValueError, match="at least 1"):
        prune(tmp_path, keep=0)


def test_damaged_ones_never_collide(tmp_path: Path) -> None:
    moved = []
    for _ in range(3):
        (tmp_path / "step-1").mkdir()
        moved.append(mark_damaged(tmp_path / "step-1"))
    assert len(set(moved)) == 3
    assert all(re.fullmatch(r"step-1\.damaged-[0-9a-f]{8}", path.name) and path.is_dir() for path in moved)
    with pytest.raises(CheckpointError, match="step-1: cannot rename"):
        mark_damaged(tmp_path / "step-1")


HOLD = """
import sys, time
from megatron_ee.checkpoint.atomic import writer_lock
with writer_lock(sys.argv[1]):
    print("stopped", flush=True)
    time.sleep(60)
"""


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(CheckpointError) as caught, writer_lock(output):
            pytest.fail("the body must not run")
        process.kill()
        process.wait()
    assert str(caught.value) == (
        f"{output}: another run (process {process.pid}) is writing here; wait for it or choose another output"
    )
    with writer_lock(output), pytest.raises(CheckpointError, match=f"process {os.getpid()}"), writer_lock(output):
        pytest.fail("the body must not run")
    with writer_lock(output):
        pass


def test_lock_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file.*: cannot write"), writer_lock(tmp_path / "file"):
        pytest.fail("the body must not run")


def test_the_lock_holder_clears_only_leftovers(tmp_path: Path) -> None:
    kept = ["step-1", "notes.tmp", "a.tmp-mine", ".trash", "step-2.damaged-01234567", "x.tmp-0123456789"]
    gone = ["step-3.tmp-01234567", ".trash-step-1-89abcdef", "exits.json.tmp-00000000"]
    for parent in (tmp_path, tmp_path / "checkpoints"):
        for name in kept + gone[:2]:
            (parent / name / "deep").mkdir(parents=True)
        (parent / gone[2]).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "checkpoints")
    with writer_lock(tmp_path):
        assert names(tmp_path) == sorted([*kept, LOCK_NAME, "checkpoints", "link"])
        assert names(tmp_path / "checkpoints") == sorted(kept)
    assert (tmp_path / "checkpoints" / "step-1" / "deep").is_dir()
