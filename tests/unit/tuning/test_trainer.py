"""What the trainer keeps of its validations, the adapter of the lowest weighted loss, and when it stops early."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.checkpoint.adapter import open_adapter
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import (
    CheckpointConfig,
    DataConfig,
    ExitConfig,
    LoggingConfig,
    ModelConfig,
    RunConfig,
    TuningConfig,
    ValidationConfig,
)
from megatron_ee.model.quality import ExitQuality, Quality
from megatron_ee.testing.tuning import GLOBAL_BATCH, Case, prepare, random_batches
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.log import RunLog
from megatron_ee.tuning.trainer import Trainer

SPECS = (ExitSpec(1, "norm", "shared", weight=3.0), ExitSpec(2, "norm", "shared", weight=1.0))
CASE = Case("", "llama2", SPECS, (((1, 4), (1, 2)),))


class Stream:
    """Random batches of a data-parallel size of one."""

    consumed = 0

    def step(self) -> list[Any]:
        batches = random_batches(131, self.consumed, 0, 1, 4)
        self.consumed += GLOBAL_BATCH
        return batches


def quality(losses: Sequence[float], final_loss: float = 1.0) -> Quality:
    exits = [
        ExitQuality(spec.layer, loss, 0.0, 0.0, 0.0, 0.0, 0.0, bins=())
        for spec, loss in zip(SPECS, losses, strict=True)
    ]
    return Quality(10, 4, final_loss, 0.0, tuple(exits), sweep=())


@pytest.fixture
def run(saved_model: Any, groups: Any, tmp_path: Path) -> Callable[..., Trainer]:
    """Tune one step for each of the validations given after the first, which is that of the untuned exits."""

    def run(*validations: Quality, patience: int = 0) -> Trainer:
        path, _ = saved_model("llama2")
        pipeline, optimizer = prepare(path, CASE, groups)
        steps = len(validations) - 1
        exits = [ExitConfig(**dataclasses.asdict(spec)) for spec in SPECS]
        config = RunConfig(
            ModelConfig(str(path), "float32"),
            exits,
            DataConfig([""]),
            tuning=TuningConfig(steps=steps, global_batch_size=GLOBAL_BATCH, patience=patience),
            validation=ValidationConfig(interval=1),
            checkpoint=CheckpointConfig(interval=0, asynchronous=False),
            logging=LoggingConfig(tensorboard=False),
        )
        description = {
            "base_model": str(path),
            "backbone_sha256": "ab" * 32,
            "model_settings": {"norm_eps": 1e-5},
            "dtype": "float32",
            "data": {"train": [], "validation": []},
            "exits": [dataclasses.asdict(spec) for spec in SPECS],
        }
        trainer = Trainer(
            config,
            pipeline,
            optimizer,
            Stream(),  # type: ignore[arg-type]
            tmp_path,
            description,
            validate=lambda pipeline, step: validations[step],
        )
        with RunLog(tmp_path, config.logging, 0) as log:
            assert trainer.run(log, Interrupt())
        return trainer

    return run


def best(output: Path) -> tuple[int, float]:
    description = json.loads((output / "adapter-best" / "exits.json").read_text())
    return description["steps"], description["validation_loss"]


def test_the_best_has_the_lowest_loss_weighted_over_the_exits(run: Callable[..., Trainer], tmp_path: Path) -> None:
    # By weights of 3 and 1 these are 0.25, 3.5, 2.75, 3.25 and 2.75; by a plain mean step 3 would be the best.
    trainer = run(quality([0, 1]), quality([4, 2]), quality([2, 5]), quality([4, 1]), quality([2, 5]))
    assert best(tmp_path) == (2, 2.75)
    assert (trainer.progress.best_step, trainer.progress.best_loss) == (2, 2.75)
    assert all(open_adapter(tmp_path / name).settings == {"norm_eps": 1e-5} for name in ("adapter", "adapter-best"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_and_never_the_best(
    bad: float, run: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(quality([bad, 1]), quality([1, bad]), quality([3, 3]), quality([4, bad]))
    assert best(tmp_path) == (2, 3.0) and trainer.progress.best_step == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert [line.split(":")[0] for line in lines] == [f"validation after step {step}" for step in (0, 1, 3)]
    assert "exit after layer 1" in lines[0] and "exit after layer 2" in lines[1] and str(bad) in lines[1]
    assert (tmp_path / "adapter" / "exits.json").is_file() and (tmp_path / "checkpoints" / "step-3").is_dir()


def test_a_run_that_never_had_a_finite_loss_saves_all_but_a_best(run: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = run(quality([1, 1]), quality([math.nan, 1]))
    assert trainer.progress.best_loss is None
    assert not (tmp_path / "adapter-best").exists()
    assert (tmp_path / "adapter" / "exits.json").is_file() and (tmp_path / "checkpoints" / "step-1").is_dir()


def test_a_final_exit_that_is_not_finite_is_named_and_the_exits_are_kept(
    run: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(quality([1, 1]), quality([2, 2], final_loss=math.nan))
    assert best(tmp_path) == (1, 2.0)
    line = next(line for line in capsys.readouterr().err.splitlines() if "not finite" in line)
    assert "the final exit (nan)" in line and "adapter-best" not in line


@pytest.mark.parametrize("worse", [[2, 2], [9, 9], [math.nan, 1]])
def test_patience_ends_a_run_that_no_longer_improves(
    worse: list[float], run: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = [[0, 0], [4, 4], [5, 5], [2, 2], worse, worse, [1, 1]]  # the first are the untuned exits'
    trainer = run(*map(quality, losses), patience=2)
    assert trainer.progress.step == 5 and best(tmp_path) == (3, 2.0)
    assert (tmp_path / "checkpoints" / "step-5").is_dir()
    assert json.loads((tmp_path / "adapter" / "exits.json").read_text())["steps"] == 5
    said = next(line for line in capsys.readouterr().err.splitlines() if "stopped early" in line)
    assert said == (
        "stopped early, after step 5: no lower validation loss in 2 validations (tuning.patience is 2); the best exits "
        f"are those of step 3, with validation loss 2.0000, in {tmp_path / 'adapter-best'}"
    )


def test_patience_without_a_finite_loss_names_the_last_exits(
    run: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(quality([1, 1]), *[quality([math.nan, 1])] * 3, patience=2)
    assert trainer.progress.step == 2
    said = next(line for line in capsys.readouterr().err.splitlines() if "stopped early" in line)
    assert said.endswith(f"no validation loss was finite; the last exits are in {tmp_path / 'adapter'}")


def test_patience_that_runs_out_with_the_last_step_stops_nothing(
    run: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(quality([1, 1]), quality([1, 1]), quality([2, 2]), patience=1).progress.step == 2
    assert "stopped early" not in capsys.readouterr().err
