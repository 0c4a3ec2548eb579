"""``tune`` with fitted exits: what is written, what a resumed run does, and what is said."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ee.commands.main import main
from megatron_ee.exits.stage import Stage
from megatron_ee.testing.project import all_tensors, read_log
from megatron_ee.tuning import fit as tuning_fit
from megatron_ee.tuning import fitted, full_model

EXITS = [{"layer": 2, "head": "shared"}, {"layer": 3, "body": "layer", "head": "shared"}, {"layer": 1, "body": "norm"}]
SHORT = {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2}
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def tune(project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``tune``; gives the exit status and stderr."""
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(project.cache))

    def run(output: Path, *arguments: object, **changes: Any) -> tuple[int, str]:
        values = {"exits": EXITS, "tuning": SHORT, "validation": {"interval": 0}, **changes}
        config = project.config(tmp_path / "run.yaml", logging={"tensorboard": False}, **values)
        status = main(["tune", "--config", str(config), "--output", str(output), *map(str, arguments)])
        return status, capsys.readouterr().err

    return run


def losses(output: Path, step: int) -> list[float]:
    """Of the exits in a validation."""
    (found,) = [line["validation"] for line in read_log(output) if "validation" in line and line["step"] == step]
    return [exit_["loss"] for exit_ in found["exits"]]


@pytest.mark.slow
def test_no_steps_give_exits_by_fitting_alone(tune: Run, tmp_path: Path) -> None:
    fitted, copied = tmp_path / "fitted", tmp_path / "copied"
    none = {**SHORT, "steps": 0}
    status, said = tune(fitted, tuning=none)
    assert status == 0 and "Exits fitted on" in said and "fewer than 8" not in said
    assert re.search(r"^ *exit after +ridge +c +agreement copied", said, re.MULTILINE)
    initial, adapter = (load_file(fitted / name / "exits.safetensors") for name in ("adapter-initial", "adapter"))
    assert initial.keys() == adapter.keys() and all(torch.equal(initial[key], adapter[key]) for key in adapter)
    described = json.loads((fitted / "adapter" / "exits.json").read_text())
    assert [exit_["init"] for exit_ in described["exits"]] == ["copy", "fit", "fit"] and described["steps"] == 0
    assert json.loads((fitted / "status.json").read_text()) == {"state": "finished", "step": 0, "steps": 0}

    exits = [{**exit_, "init": "copy"} for exit_ in EXITS]
    status, said = tune(copied, tuning=none, exits=exits)
    assert status == 0 and "Exits fitted" not in said and not (copied / "adapter-initial").exists()
    plain = load_file(copied / "adapter" / "exits.safetensors")
    changed = {key for key in plain if not torch.equal(plain[key], adapter[key])}
    assert changed and all(key.endswith("mlp.down_proj.weight") for key in changed)
    assert len(losses(fitted, 0)) == 3
    best = json.loads((fitted / "adapter-best" / "exits.json").read_text())
    assert best["steps"] == 0 and best["validation_loss"] < sum(losses(copied, 0)) / 3
    assert not (copied / "adapter-best").exists()

    status, said = tune(fitted, "--resume", tuning=none)
    assert status == 0 and "Exits fitted" not in said, said


@pytest.mark.parametrize(
    "changes, expected",
    [
        # Validation and the fit, the layers up to the deepest exit to tune, and threshold mode after the last step.
        ({}, [4, 3, 4]),
        pytest.param({"validation": {"interval": 0, "acceptance": {"prompts": 0}}}, [4, 3], marks=pytest.mark.slow),
        pytest.param({"validation": {"interval": 0, "free_running": True}}, [4], marks=pytest.mark.slow),
        pytest.param({"loss": {"distillation": {"kl": 1.0, "top_k": 8}}}, [4], marks=pytest.mark.slow),
    ],
    ids=["default", "no prompts", "free running", "distillation"],
)
def test_how_often_layers_are_loaded(
    changes: dict[str, Any], expected: list[int], tune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    usual = full_model.load_backbone

    def count(stage: Stage, *arguments: Any) -> None:
        loaded.append(len(stage.backbone.layers))
        usual(stage, *arguments)

    monkeypatch.setattr(full_model, "load_backbone", count)
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(tmp_path / "cache"))
    assert tune(tmp_path / "run", tuning={**SHORT, "steps": 1}, **changes)[0] == 0
    assert loaded == expected


@pytest.mark.slow
def test_resuming(tune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    assert tune(output)[0] == 0
    expected = all_tensors(output, 2)
    initial = (output / "adapter-initial" / "exits.safetensors").read_bytes()

    def again(**changes: Any) -> str:
        """Resume without a checkpoint."""
        for name in ("checkpoints", "adapter", "adapter-best"):
            shutil.rmtree(output / name)
        status, said = tune(output, "--resume", **changes)
        assert status == 0
        return said

    said = again()
    assert "exits are fitted already" in said and "Exits fitted on" not in said
    assert all(torch.equal(tensor, expected[key]) for key, tensor in all_tensors(output, 2).items())

    damaged = bytearray(initial)
    damaged[-5] ^= 1
    (output / "adapter-initial" / "exits.safetensors").write_bytes(damaged)
    assert "Exits fitted on" in again()
    assert (output / "adapter-initial" / "exits.safetensors").read_bytes() == initial

    assert "Exits fitted on" in again(fit={"ridge": 0.5})  # other settings
    assert (output / "adapter-initial" / "exits.safetensors").read_bytes() != initial

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is fitted")

    monkeypatch.setattr(fitted, "fit_exits", refuse)
    shutil.rmtree(output / "adapter-initial")
    assert tune(output, "--resume", tuning={**SHORT, "steps": 3})[0] == 0  # from a checkpoint
    start = tmp_path / "other"
    assert tune(start, "--init-adapter", output / "adapter")[0] == 0
    assert not (output / "adapter-initial").exists() and not (start / "adapter-initial").exists()


@pytest.mark.slow
def test_exits_that_are_fitted_in_turns(tune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short; the run is the same."""
    together, turns = tmp_path / "together", tmp_path / "turns"
    assert tune(together)[0] == 0
    split, turns_of = tuning_fit.split_turns, []
    monkeypatch.setattr(tuning_fit, "MEMORY_SHARE", 0)
    monkeypatch.setattr(tuning_fit, "split_turns", lambda *given: turns_of.append(split(*given)) or turns_of[-1])
    assert tune(turns)[0] == 0
    assert turns_of == [[{2}, {3}]]
    expected, found = all_tensors(together, 2), all_tensors(turns, 2)
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_heads_are_tuned_behind_bodies_that_are_fitted_to_the_models_own(
    tune: Run, tmp_path: Path, project: Any
) -> None:
    exits = [{"layer": 2, "head": "shared"}, {"layer": 2, "head": "own"}, {"layer": 2, "head": "low_rank", "rank": 4}]
    fitted, tuned = [], []
    for exit_ in exits:
        output = tmp_path / exit_["head"]
        assert tune(output, exits=[exit_])[0] == 0
        for name, found in (("adapter-initial", fitted), ("adapter", tuned)):
            found.append(load_file(output / name / "exits.safetensors"))
    shared, own, low_rank = fitted
    assert shared and all(
        torch.equal(own[key], shared[key]) and torch.equal(low_rank[key], shared[key]) for key in shared
    )
    (head,) = own.keys() - shared.keys()
    assert torch.equal(own[head], load_file(project.model / "model.safetensors")["lm_head.weight"])
    assert len(low_rank.keys() - shared.keys()) == 2
    for before, after in zip(fitted[1:], tuned[1:], strict=True):
        assert all(not torch.equal(before[key], after[key]) for key in before.keys() - shared.keys())


def test_little_data_and_a_raised_ridge_are_said(tune: Run, tmp_path: Path) -> None:
    output = tmp_path / "run"
    status, said = tune(
        output, tuning={**SHORT, "steps": 0}, fit={"tokens": 100, "ridge": 0}, validation={"sequences": 2}
    )
    assert status == 0
    assert "96 unmasked tokens are 0.9 for each of the MLP's 112 features; fewer than 8 fit poorly" in said
    assert "or raise fit.tokens" in said and "so ridge 0 was raised to" in said


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"exits": [{"layer": 1, "body": "embedding", "init": "fit"}]}, "body embedding has nothing to fit"),
        ({"fit": {"tokens": 0}}, "fit.tokens: must be at least 1, not 0"),
        ({"fit": {"tokens": "many"}}, "fit.tokens: must be auto or a whole number, not 'many'"),
        ({"fit": {"ridge": -1}}, "fit.ridge: must be a number of at least 0, not -1"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], line: str, tune: Run, tmp_path: Path) -> None:
    status, said = tune(tmp_path / "run", **changes)
    assert status == 2 and line in said and not (tmp_path / "run").exists()
