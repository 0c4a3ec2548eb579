"""Runs that are killed in a save, or whose disk fails: the checkpoint before is whole, the message names the file.

Each fault meets the third save of a run, at step 9, in a process that went on after step 6. In the end the run that
goes on from what is left must equal one that nothing happened to, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ee.checkpoint.adapter import open_adapter
from megatron_ee.checkpoint.failpoints import NAMES, VARIABLE
from megatron_ee.checkpoint.manifest import MANIFEST
from megatron_ee.checkpoint.resume import load_latest
from megatron_ee.checkpoint.store import open_checkpoint
from megatron_ee.errors import CheckpointError, DamagedError
from megatron_ee.testing.project import Project, read_log, saved_tensors
from megatron_ee.testing.ranks import Ranks, run_command

SHARD = "shard-0000.safetensors"
KILL = -signal.SIGKILL
SLOW = pytest.mark.slow
# Before, within and after what is written, and between two renames; at the others the state on disk is one of these.
TELLING = ("save.shard", "save.manifest-done")
POINTS = [name for name in NAMES if not name.startswith("convert.")]
ASYNCHRONOUS = [True, pytest.param(False, marks=SLOW)]


def limited_command(file_size: int, arguments: list[str], environment: dict[str, str], stderr: str) -> int:
    """``run_command`` in a process whose files cannot grow beyond ``file_size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    return run_command(arguments, environment, stderr)


class Run:
    """A run of 12 steps that saves every 3, each time in a new process."""

    def __init__(self, project: Project, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output, self.stderr = folder / "run", folder / "stderr"
        self.checkpoints = self.output / "checkpoints"
        self._environment = {"MEGATRON_EE_CACHE": str(project.cache), VARIABLE: ""}
        self._config = project.config(
            folder / "run.yaml",
            data={"validation": []},
            checkpoint={"interval": 3},
            logging={"tensorboard": False},
        )

    def go(self, *arguments: object, failpoint: str = "", file_size: int = resource.RLIM_INFINITY) -> tuple[int, str]:
        """Exit status (of a signal, negative) and stderr of one process."""
        before = len(self._errors())
        command = ["tune", "--config", str(self._config), "--output", str(self.output), *map(str, arguments)]
        environment = {**self._environment, VARIABLE: failpoint}
        with Ranks(1, limited_command, file_size, command, environment, str(self.stderr), timeout=60) as ranks:
            ranks.processes[0].join(60)
            code = ranks.processes[0].exitcode
            status = ranks.results()[0] if code == 0 else code
        assert status is not None, "still running"
        return status, self._errors()[before:]

    def _errors(self) -> str:
        path = self.stderr.with_name("stderr-0")
        return path.read_text() if path.exists() else ""

    def content(self, step: int) -> dict[str, bytes]:
        """Every file of a checkpoint."""
        return {path.name: path.read_bytes() for path in (self.checkpoints / f"step-{step}").iterdir()}

    def steps(self) -> list[int]:
        """Of the checkpoints that stand under their own names."""
        return sorted(int(path.name[5:]) for path in self.checkpoints.glob("step-*") if path.name[5:].isdecimal())


@pytest.fixture(scope="module")
def straight(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without any fault, and without any save in the background."""
    run = Run(project, tmp_path_factory.mktemp("straight"))
    assert run.go("--checkpoint.asynchronous", "false") == (0, run._errors())
    return run


@pytest.fixture(scope="module")
def halfway_folder(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 6."""
    folder = tmp_path_factory.mktemp("halfway")
    run = Run(project, folder)
    assert run.go(failpoint="save.begin:3")[0] == KILL
    assert run.steps() == [3, 6]
    return folder


@pytest.fixture
def halfway(project: Project, halfway_folder: Path, tmp_path: Path) -> Run:
    """A copy of it, to go on with."""
    shutil.copytree(halfway_folder / "run", tmp_path / "run")
    return Run(project, tmp_path)


def assert_goes_on(run: Run, straight: Run, step: int) -> str:
    """Resume after ``step``, and end as the other run did. Gives what was said."""
    status, errors = run.go("--resume")
    assert status == 0, errors
    assert f"continuing after step {step}\n" in errors
    assert read_log(run.output) == read_log(straight.output)
    found, expected = (saved_tensors(each.checkpoints / "step-12") for each in (run, straight))
    assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in expected)
    for name in ("exits.safetensors", "exits.json"):
        ours, theirs = ((each.output / "adapter" / name).read_bytes() for each in (run, straight))
        assert ours == theirs
    left = [path.name for path in (*run.output.iterdir(), *run.checkpoints.iterdir())]
    assert not [name for name in left if "tmp-" in name or "trash-" in name or "ready-" in name]
    return errors


def test_the_log_tells_of_saves(straight: Run) -> None:
    lines = (straight.output / "log.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"save"' in line and '"stopped_seconds"' in line]) == 4


@pytest.mark.parametrize(
    "point, asynchronous",
    [
        *(pytest.param(point, True, marks=() if point in TELLING else SLOW) for point in POINTS),
        pytest.param("save.shard", False, marks=SLOW),
        pytest.param("save.manifest-done", False, marks=SLOW),
        pytest.param("save.renamed", False, marks=SLOW),
    ],
)
def test_kill_9_at_every_failpoint(point: str, asynchronous: bool, halfway: Run, straight: Run) -> None:
    count = ":20" if point == "save.shard" else ""  # in the middle of the shard
    before = halfway.content(6)
    status, errors = halfway.go("--resume", "--checkpoint.asynchronous", asynchronous, failpoint=point + count)
    assert status == KILL, errors
    complete = point in ("save.renamed", "prune.renamed", "replace.ready", "replace.between")
    assert halfway.steps()[-1] == (9 if complete else 6)
    assert halfway.content(6) == before
    for step in halfway.steps():
        saved_tensors(halfway.checkpoints / f"step-{step}")
    assert open_adapter(halfway.output / "adapter").steps == (9 if point == "replace.between" else 6)
    assert_goes_on(halfway, straight, 9 if complete else 6)


# ---------------------------------------------------------------------------------------------------- disk faults


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A file system at ``place``; skips where this process may not mount one."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Nothing can be written in ``directory`` meanwhile, by root either."""
    if os.geteuid() != 0:
        directory.chmod(0o555)
        try:
            yield
        finally:
            directory.chmod(0o755)
        return
    with mounted(directory, "--bind", str(directory)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(directory)], check=True)
        yield


def assert_fails(run: Run, file: str, reason: str, *arguments: object, file_size: int | None = None) -> None:
    """The next process ends with one line that names the file, and leaves what was there as it was."""
    before = run.content(6)
    limit = resource.RLIM_INFINITY if file_size is None else file_size
    status, errors = run.go("--resume", *arguments, file_size=limit)
    assert status == 1
    last = errors.splitlines()[-1]
    assert "error: " in last and reason in last and file in last, errors
    assert "Traceback" not in errors
    assert run.steps()[-1] == 6 and run.content(6) == before
    assert not list(run.checkpoints.glob("*.tmp-*"))
    assert '"failed"' in (run.output / "status.json").read_text()


@SLOW
@pytest.mark.parametrize("asynchronous", [True, False])
def test_no_room_for_the_shard(asynchronous: bool, halfway: Run, straight: Run) -> None:
    """A limit on the size of files, which needs no privilege; it is met in the middle of the shard."""
    size = (halfway.checkpoints / "step-6" / SHARD).stat().st_size
    options = ("--checkpoint.asynchronous", asynchronous)
    assert_fails(halfway, SHARD, "File too large; free some space", *options, file_size=size // 2)
    assert_goes_on(halfway, straight, 6)


@pytest.mark.parametrize("asynchronous", ASYNCHRONOUS)
def test_a_full_disk(asynchronous: bool, halfway: Run, straight: Run) -> None:
    """A small file system that has room for two checkpoints, but not for a third beside them."""
    used = sum(path.stat().st_size for path in halfway.output.rglob("*") if path.is_file())
    kept = halfway.output.rename(halfway.output.with_name("kept"))
    size = used + (kept / "checkpoints" / "step-6" / SHARD).stat().st_size // 2
    with mounted(halfway.output, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        shutil.copytree(kept, halfway.output, dirs_exist_ok=True)
        options = ("--checkpoint.asynchronous", asynchronous)
        assert_fails(halfway, SHARD, "No space left on device; free some space", *options)
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(halfway.output)], check=True)
        assert_goes_on(halfway, straight, 6)


@SLOW
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_read_only_directory(asynchronous: bool, halfway: Run, straight: Run) -> None:
    with read_only(halfway.checkpoints):
        options = ("--checkpoint.asynchronous", asynchronous)
        assert_fails(halfway, "checkpoints/step-9.tmp-", "cannot create", *options)
        # The error is not kept for the save that comes next.
        assert read_log(halfway.output)[-1]["step"] in ((9, 10, 11) if asynchronous else (9,))
    assert_goes_on(halfway, straight, 6)


def test_an_output_that_is_read_only_from_the_start(halfway: Run) -> None:
    with read_only(halfway.output):
        status, errors = halfway.go("--resume")
    assert status == 1
    assert errors.count("\n") == 1 and "cannot" in errors and str(halfway.output) in errors, errors


# ------------------------------------------------------------------------------------------------- damaged files


def flip(path: Path, place: random.Random) -> None:
    """One bit, anywhere."""
    content = bytearray(path.read_bytes())
    content[place.randrange(len(content))] ^= 1 << place.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, place: random.Random) -> None:
    """Cut, anywhere."""
    os.truncate(path, place.randrange(path.stat().st_size))


def remove(path: Path, place: random.Random) -> None:
    path.unlink()


DAMAGES = [
    (flip, SHARD),
    (flip, MANIFEST),
    (truncate, SHARD),
    (truncate, MANIFEST),
]


@pytest.mark.parametrize(
    "damage, file",
    [
        (flip, SHARD),
        (truncate, MANIFEST),
        *(pytest.param(*each, marks=SLOW) for each in [*DAMAGES[1:3], (remove, SHARD), (remove, MANIFEST)]),
    ],
)
def test_a_damaged_checkpoint_is_set_aside(
    damage: Callable[[Path, random.Random], None], file: str, halfway: Run, straight: Run
) -> None:
    damage(halfway.checkpoints / "step-6" / file, random.Random(1))
    errors = assert_goes_on(halfway, straight, 3)
    (line,) = (line for line in errors.splitlines() if "DAMAGED CHECKPOINT" in line)
    assert file in line and "step-6" in line and "falling back" in line
    assert len(list(halfway.checkpoints.glob("step-6.damaged-*"))) == 1


@pytest.mark.parametrize("damage, file", [DAMAGES[0], *(pytest.param(*each, marks=SLOW) for each in DAMAGES[1:])])
def test_damage_anywhere_is_noticed(
    damage: Callable[[Path, random.Random], None], file: str, halfway: Run, straight: Run
) -> None:
    """As above, at many places, without a process for each."""
    good = halfway.content(6)
    expected = saved_tensors(halfway.checkpoints / "step-3")
    for seed in range(100):
        path = halfway.checkpoints / "step-6"
        for name, content in good.items():
            path.mkdir(exist_ok=True)
            (path / name).write_bytes(content)
        damage(path / file, random.Random(seed))
        lines: list[str] = []
        found = load_latest(halfway.checkpoints, lambda checkpoint: saved_tensors(checkpoint.path), lines.append)
        if found is not None and not lines:  # 1e-05 and 1E-05 are the same number
            assert file == MANIFEST and path.joinpath(file).read_bytes() != good[file]
            assert open_checkpoint(path).metadata["progress"]["step"] == 6
            continue
        assert found is not None and all(found[key].equal(expected[key]) for key in expected)
        assert len(lines) == 1 and f"step-6/{file}" in lines[0]


@pytest.mark.parametrize("damage", [flip, truncate])
def test_damage_of_an_adapter_is_noticed(
    damage: Callable[[Path, random.Random], None], halfway: Run, tmp_path: Path
) -> None:
    weights = halfway.output / "adapter" / "exits.safetensors"
    good = weights.read_bytes()
    for seed in range(100):
        weights.write_bytes(good)
        damage(weights, random.Random(seed))
        with pytest.raises(CheckpointError, match=r"adapter/exits\.safetensors: "):
            open_adapter(halfway.output / "adapter")
    weights.write_bytes(good)
    truncate(halfway.output / "adapter" / "exits.json", random.Random(0))
    with pytest.raises(DamagedError, match=r"adapter/exits\.json: "):
        open_adapter(halfway.output / "adapter")


def test_nothing_left_to_fall_back_to(halfway: Run) -> None:
    for step in (3, 6):
        flip(halfway.checkpoints / f"step-{step}" / SHARD, random.Random(step))
    status, errors = halfway.go("--resume")
    assert status == 1
    assert errors.count("DAMAGED CHECKPOINT") == 2
    assert "every checkpoint in it is damaged" in errors.splitlines()[-1]
