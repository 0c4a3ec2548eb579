"""What ``status.json`` says, and that a disk which does not take it hides no error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_ee.config.schema import TuningConfig
from megatron_ee.errors import CheckpointError
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.state import RunProgress
from megatron_ee.tuning.status import STATUS, reported_status


def read(output: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((output / STATUS).read_text())
    return content


@pytest.mark.parametrize(
    "told, done, stale, state",
    [
        (None, 5, 0, "finished"),
        (None, 3, 2, "finished"),
        ("SIGTERM", 3, 2, "finished"),  # while the stopped run was saved
        ("SIGTERM", 3, 1, "interrupted"),
    ],
)
def test_a_run_that_ends_well(told: str | None, done: int, stale: int, state: str, tmp_path: Path) -> None:
    progress, interrupt = RunProgress(), Interrupt()
    with reported_status(tmp_path, TuningConfig(steps=5, patience=2), progress, interrupt, enabled=True):
        assert read(tmp_path) == {"state": "running", "step": 0, "steps": 5}
        progress.step, progress.stale_validations, interrupt.name = done, stale, told
    assert read(tmp_path) == {"state": state, "step": done, "steps": 5}


def test_a_run_that_fails(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        reported_status(tmp_path, TuningConfig(steps=5), RunProgress(), Interrupt(), enabled=True),
    ):
        raise ZeroDivisionError
    assert read(tmp_path)["state"] == "failed"


def test_the_error_that_counts_is_the_first(tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    with (
        pytest.raises(CheckpointError, match="the shard cannot be written"),
        reported_status(output, TuningConfig(steps=5), RunProgress(), Interrupt(), enabled=True),
    ):
        shutil.rmtree(output)
        raise CheckpointError("the shard cannot be written")
