"""Saves in the background of several ranks: shared writing, and one rank's fault that ends the run of all."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ee.checkpoint import writing
from megatron_ee.checkpoint.failpoints import VARIABLE
from megatron_ee.checkpoint.manifest import MANIFEST
from megatron_ee.checkpoint.saving import Saver, group_saver
from megatron_ee.checkpoint.writing import Piece
from megatron_ee.errors import CheckpointError
from megatron_ee.parallel.groups import process_groups
from megatron_ee.testing.project import Project, read_log, saved_tensors
from megatron_ee.testing.ranks import Ranks, run_command, run_ranks

SLOW = pytest.mark.slow
LIMIT = 100_000  # bytes: less than a shard, more than any other file


def faulty_command(rank: int, fault: str, arguments: list[str], environment: dict[str, str], stderr: str) -> int:
    """``run_command`` on one rank, with a failpoint, or files of at most ``LIMIT`` bytes, if it is this one."""
    if os.environ["RANK"] == str(rank):
        if fault == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        else:
            os.environ[VARIABLE] = fault
    return run_command(arguments, environment, stderr)


class Run:
    """A run of 12 steps on two data-parallel ranks that saves every 3."""

    def __init__(self, project: Project, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output, self.stderr = folder / "run", folder / "stderr"
        self.checkpoints = self.output / "checkpoints"
        self._environment = {"MEGATRON_EE_CACHE": str(project.cache)}
        self._config = project.config(
            folder / "run.yaml",
            data={"validation": []},
            checkpoint={"interval": 3},
            logging={"tensorboard": False},
        )

    def start(self, *arguments: object, rank: int = 0, fault: str = "") -> Ranks:
        command = ["tune", "--config", str(self._config), "--output", str(self.output), *map(str, arguments)]
        return Ranks(2, faulty_command, rank, fault, command, self._environment, str(self.stderr), timeout=60)

    def go(self, *arguments: object) -> None:
        """To its end."""
        with self.start(*arguments) as ranks:
            assert ranks.results() == [0, 0]

    def errors(self, rank: int = 0) -> str:
        return self.stderr.with_name(f"stderr-{rank}").read_text()


@pytest.fixture(scope="module")
def straight(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without any fault, and without any save in the background."""
    run = Run(project, tmp_path_factory.mktemp("straight"))
    run.go("--checkpoint.asynchronous", "false")
    return run


def assert_ended_as(run: Run, straight: Run) -> None:
    assert read_log(run.output) == read_log(straight.output)
    found, expected = (saved_tensors(each.checkpoints / "step-12") for each in (run, straight))
    assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in expected)


def test_two_ranks_write_half_a_checkpoint_each(project: Project, straight: Run, tmp_path: Path) -> None:
    run = Run(project, tmp_path)
    run.go()
    assert_ended_as(run, straight)
    assert run.errors(1).strip() == ""
    manifest = json.loads((run.checkpoints / "step-12" / MANIFEST).read_text())
    sizes = [file["size"] for file in manifest["files"].values()]
    assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes)
    weights = [tensor["pieces"] for key, tensor in manifest["tensors"].items() if key.startswith("exits.")]
    assert {piece["file"] for pieces in weights for piece in pieces} == manifest["files"].keys()


@SLOW
@pytest.mark.parametrize(
    "rank, point",
    [
        (1, "save.shard"),
        (0, "save.manifest-done:2"),
        (1, "save.thread:2"),
    ],
)
def test_a_rank_killed_in_a_save_ends_the_run(
    rank: int, point: str, project: Project, straight: Run, tmp_path: Path
) -> None:
    run = Run(project, tmp_path)
    if point == "save.shard":  # in the middle of the second one: each is a header and some tensors
        manifest = json.loads((straight.checkpoints / "step-12" / MANIFEST).read_text())
        pieces = [piece for tensor in manifest["tensors"].values() for piece in tensor["pieces"]]
        runs = 1 + sum(piece["file"] == f"shard-{rank:04}.safetensors" for piece in pieces)
        point = f"save.shard:{runs + runs // 2}"
    with run.start(rank=rank, fault=point) as ranks:
        ranks.processes[rank].join(60)
        assert ranks.processes[rank].exitcode == -signal.SIGKILL
        ranks.processes[1 - rank].join(20)
        assert ranks.processes[1 - rank].exitcode not in (None, 0)
    assert f"error: rank {rank} (" in run.errors(1 - rank)
    assert "Traceback" not in run.errors(1 - rank)
    assert not (run.checkpoints / "step-6").exists()
    run.go("--resume")
    assert "continuing after step 3\n" in run.errors()
    assert_ended_as(run, straight)


@SLOW
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_on_one_rank_fails_on_all(
    asynchronous: bool, project: Project, straight: Run, tmp_path: Path
) -> None:
    run = Run(project, tmp_path)
    started = time.monotonic()
    with run.start("--checkpoint.asynchronous", asynchronous, rank=1, fault="limit") as ranks:
        assert ranks.results() == [1, 1]
    assert time.monotonic() - started < 20
    last = run.errors().splitlines()[-1]
    assert "rank 1: " in last and "shard-0001.safetensors: cannot write: File too large" in last
    assert "Traceback" not in run.errors() + run.errors(1)
    assert list(run.checkpoints.iterdir()) == []
    steps = [line["step"] for line in read_log(run.output)]
    assert steps[-1] < 12 if asynchronous else steps[-1] == 3
    run.go("--resume")
    assert_ended_as(run, straight)


def remove(shards: list[Path]) -> None:
    shards[1].unlink()


def swap(shards: list[Path]) -> None:
    spare = shards[0].with_name("spare")
    shards[0].rename(spare)
    shards[1].rename(shards[0])
    spare.rename(shards[1])


def duplicate(shards: list[Path]) -> None:
    shutil.copy(shards[0], shards[1])


@SLOW
@pytest.mark.parametrize("damage", [remove, swap, duplicate])
def test_missing_and_swapped_shards(damage: Callable[[list[Path]], None], straight: Run, tmp_path: Path) -> None:
    run = Run.__new__(Run)
    run.__dict__ |= {**straight.__dict__, "output": tmp_path / "run", "stderr": tmp_path / "stderr"}
    run.checkpoints = run.output / "checkpoints"
    shutil.copytree(straight.output, run.output)
    damage(sorted((run.checkpoints / "step-12").glob("shard-*")))
    run.go("--resume")
    (line,) = (line for line in run.errors().splitlines() if "DAMAGED CHECKPOINT" in line)
    assert "step-12/shard-000" in line
    assert "continuing after step 9\n" in run.errors()
    assert_ended_as(run, straight)


# ------------------------------------------------------------------------------------- the saver, without a run


def overlapping_collectives(folder: Path, slow: int) -> list[int]:
    """On one rank: gather over the main thread's group while a save, held up on one rank, gathers over its own."""
    with process_groups() as groups, group_saver(groups, asynchronous=True) as saver:
        import torch

        own = torch.full((4,), float(groups.rank))
        whole = writing.write_safetensors

        def slowly(*arguments: object, **options: object) -> object:
            time.sleep(0.5 * (groups.rank == slow))
            return whole(*arguments, **options)  # type: ignore[arg-type]

        writing.write_safetensors = slowly  # type: ignore[assignment]
        counts = []
        for step in range(3):
            saver.save(folder / f"step-{step}", [Piece("w", (8,), (4 * groups.rank,), own + step)], {})
            counts.append(0)
            done = False
            while not all(groups.gather(done)):
                saver.check(groups.gather(saver.failure))
                done = done or bool(saver.finished())
                counts[-1] += 1
                assert groups.gather(counts[-1]) == [counts[-1]] * 2
        return counts


@SLOW
def test_saves_do_not_meet_the_main_threads_messages(tmp_path: Path) -> None:
    (first, second) = run_ranks(2, overlapping_collectives, tmp_path, 1, timeout=60)
    assert min(first) > 5 and first == second
    for step in range(3):
        saved = saved_tensors(tmp_path / f"step-{step}")["w"]
        assert saved.tolist() == [step] * 4 + [step + 1] * 4


def failing_alone(folder: Path) -> list[str]:
    """On one rank: rank 1's first save fails; both then save well."""
    messages = []
    with process_groups() as groups:
        import torch

        saver: Saver = group_saver(groups, asynchronous=True)
        bad = [Piece("w", (8,), (4 * groups.rank,), torch.ones(4, dtype=torch.complex128 if groups.rank else None))]
        saver.save(folder / "step-1", bad, {})
        while True:
            try:
                saver.check(groups.gather(saver.failure))
            except CheckpointError as error:
                assert error.common
                messages.append(str(error))
                break
        good = [Piece("w", (8,), (4 * groups.rank,), torch.ones(4))]
        saver.save(folder / "step-2", good, {})
        saver.wait()
    return messages


def test_a_failure_is_raised_on_all_ranks_at_the_same_check(tmp_path: Path) -> None:
    (first, second) = run_ranks(2, failing_alone, tmp_path, timeout=60)
    assert "rank 1: " in first[0] and "complex128" in first[0] and "complex128" in second[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert saved_tensors(tmp_path / "step-2")["w"].tolist() == [1] * 8
