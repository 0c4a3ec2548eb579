"""``megatron-ee tune`` on several processes: the same run as on one, stopping together, failing together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ee.testing.project import Project, all_tensors, read_log
from megatron_ee.testing.ranks import Ranks, free_port, run_command, run_ranks

PIPELINE = [{"layers": [1, 2], "exits": [1]}, {"layers": [3, 3]}, {"exits": [2, 3]}]


def tune(project: Project, world_size: int, tmp_path: Path, *arguments: object, **changes: Any) -> Ranks:
    """Start ``tune`` on so many ranks; their stderr goes to ``tmp_path/stderr-RANK``."""
    config = project.config(tmp_path / "run.yaml", **changes)
    command = ["tune", "--config", str(config), "--output", str(tmp_path / "run"), *map(str, arguments)]
    environment = {"MEGATRON_EE_CACHE": str(project.cache)}
    return Ranks(world_size, run_command, command, environment, str(tmp_path / "stderr"), timeout=120)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_done(output: Path) -> int:
    try:
        lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    return max((line["step"] for line in lines), default=0)


def close(found: Any, expected: Any, where: str = "") -> None:
    """Equal but for the order in which float32 numbers were added."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            close(found[index], value, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=2e-4, abs=2e-5), where
    else:
        assert found == expected, where


@pytest.mark.parametrize(
    "world_size, parallel",
    [
        pytest.param(2, {"tensor": 2, "sequence": True}, marks=pytest.mark.smoke),
        pytest.param(3, {"pipeline": 3, "layout": PIPELINE}, marks=pytest.mark.slow),
        pytest.param(4, {"pipeline": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_on_several_ranks_is_the_run_of_one(
    world_size: int, parallel: dict[str, Any], project: Project, tuned: Path, tmp_path: Path
) -> None:
    with tune(project, world_size, tmp_path, parallel=parallel) as ranks:
        assert ranks.results() == [0] * world_size
    output = tmp_path / "run"
    close(read_log(output), read_log(tuned))
    for name in ("adapter", "adapter-best"):
        found, expected = (load_file(run / name / "exits.safetensors") for run in (output, tuned))
        assert list(found) == list(expected)
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    assert json.loads((output / "status.json").read_text()) == {"state": "finished", "step": 12, "steps": 12}
    shown = (tmp_path / "stderr-0").read_text()
    assert "stage" in shown and "tuning" in shown
    for rank in range(1, world_size):
        assert not (tmp_path / f"stderr-{rank}").read_text().strip()


@pytest.mark.slow
def test_validation_does_not_wait_for_teacher_messages(project: Project, tmp_path: Path) -> None:
    """With distillation, exits on other stages than the final one's wait for its verdict in tuning alone."""
    taught = {"loss": {"distillation": {"kl": 1.0, "top_k": 8}}, "validation": {"interval": 2, "sequences": 8}}
    short = {"tuning": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2}}
    logs = {}
    for world_size, parallel in (
        (1, {}),
        (3, {"pipeline": 3, "layout": [*PIPELINE[:1], {"layers": [3, 4]}, PIPELINE[2]]}),
    ):
        place = tmp_path / str(world_size)
        place.mkdir()
        with tune(project, world_size, place, parallel=parallel, **taught, **short) as ranks:
            assert ranks.results() == [0] * world_size
        logs[world_size] = read_log(place / "run")
    close(logs[3], logs[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    number: signal.Signals, project: Project, tuned: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    slow = {"interval": 1, "sequences": 128}  # validation at every step gives the signal time to arrive in between
    with tune(project, 2, tmp_path, parallel={"pipeline": 2}, validation=slow) as ranks:
        wait_for(lambda: steps_done(output) >= 2)
        os.kill(ranks.processes[1].pid, number)
        assert ranks.results() == [0, 0]
    status = json.loads((output / "status.json").read_text())
    assert status["state"] == "interrupted" and 2 <= status["step"] < 12
    assert number.name in (tmp_path / "stderr-0").read_text()
    # On with one process, as if it had always been one.
    with tune(project, 1, tmp_path, "--resume") as ranks:
        assert ranks.results() == [0]
    for key, tensor in all_tensors(tuned, 12).items():
        torch.testing.assert_close(all_tensors(output, 12)[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.slow
def test_patience_stops_all_ranks_at_the_same_step(project: Project, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "optimizer": {"lr": 0.1, "min_lr": 0.1},  # the validation loss soon gets worse
        "validation": {"interval": 2, "sequences": 8},
        "tuning": {"steps": 40, "patience": 2},
        "parallel": {"pipeline": 2},
    }
    with tune(project, 2, tmp_path, **settings) as ranks:
        assert ranks.results() == [0, 0]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished" and 4 < status["step"] < 40
    last = status["step"]
    assert f"stopped early, after step {last}: " in (tmp_path / "stderr-0").read_text()
    assert not (tmp_path / "stderr-1").read_text().strip()
    assert steps_done(tmp_path / "run") == last and all_tensors(tmp_path / "run", last)
    assert json.loads((tmp_path / "run" / "adapter-best" / "exits.json").read_text())["steps"] == last - 4


@pytest.mark.parametrize(
    "number, seconds", [(signal.SIGKILL, 25), pytest.param(signal.SIGSTOP, 25, marks=pytest.mark.slow)]
)
def test_a_lost_rank_ends_the_run_and_is_named(
    number: signal.Signals, seconds: float, project: Project, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    parallel = {"pipeline": 2, "timeout_seconds": 5}
    with tune(project, 2, tmp_path, parallel=parallel, tuning={"steps": 5000}) as ranks:
        wait_for(lambda: steps_done(output) >= 2)
        os.kill(ranks.processes[1].pid, number)
        started = time.monotonic()
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode not in (None, 0)
        assert time.monotonic() - started < seconds
    message = (tmp_path / "stderr-0").read_text()
    assert "rank 1 (stage 1, step " in message
    assert json.loads((output / "status.json").read_text())["state"] == "failed"


def test_losses_that_are_not_finite_are_skipped_and_then_end_the_run(project: Project, tmp_path: Path) -> None:
    optimizer = {"lr": 1.0e18, "min_lr": 1.0e18}
    with tune(project, 2, tmp_path, parallel={"pipeline": 2}, optimizer=optimizer) as ranks:
        assert ranks.results() == [1, 1]
    message = (tmp_path / "stderr-0").read_text().splitlines()[-1]
    assert "exit 1" in message and "sequences [" in message and "tuning.skip_limit is 2" in message
    log = read_log(tmp_path / "run")
    skipped = [line["step"] for line in log if line.get("skipped")]
    assert len(skipped) == 3 and skipped == list(range(skipped[0], skipped[0] + 3))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_several_ranks_report_a_bad_setting_once(project: Project, tmp_path: Path) -> None:
    with tune(project, 2, tmp_path, parallel={"pipeline": 2}, exits=[{"layer": 9}]) as ranks:
        assert ranks.results() == [2, 2]
    lines = [line for rank in (0, 1) for line in (tmp_path / f"stderr-{rank}").read_text().splitlines()]
    assert len(lines) == 1 and "exits[0].layer" in lines[0]
    assert not (tmp_path / "run").exists()


def visible_devices() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_ranks_of_tests_see_no_gpu() -> None:
    """They communicate over gloo, on a machine with GPUs too."""
    assert run_ranks(1, visible_devices) == [""]


@pytest.mark.slow
def test_torchrun_starts_it(project: Project, tuned: Path, tmp_path: Path) -> None:
    """As a user starts it, and with a signal to one worker, after which torchrun itself ends with a failure or not."""
    config, output = project.config(tmp_path / "run.yaml", parallel={"tensor": 2}), tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command += ["-m", "megatron_ee", "tune", "--config", config, "--output", output]
    environment = {**project.environment(), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    close(read_log(output), read_log(tuned))
