"""``tune`` with gates: what is written, what a resumed run does, and that tuning itself does not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ee.commands.main import main
from megatron_ee.testing.project import all_tensors
from megatron_ee.tuning import gates as tuning_gates

SHORT = {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2}
Run = Callable[..., tuple[int, str]]


def exits(*, gate: bool) -> list[dict[str, Any]]:
    return [{"layer": 2, "body": "norm", "gate": gate}, {"layer": 3, "body": "norm", "head": "shared"}]


@pytest.fixture
def tune(project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``tune``; gives the exit status and stderr."""
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(project.cache))

    def run(output: Path, *arguments: object, gate: bool = True) -> tuple[int, str]:
        config = project.config(
            tmp_path / "run.yaml",
            logging={"tensorboard": False},
            exits=exits(gate=gate),
            tuning=SHORT,
            validation={"interval": 0, "sequences": 4},
        )
        status = main(["tune", "--config", str(config), "--output", str(output), *map(str, arguments)])
        return status, capsys.readouterr().err

    return run


def gates(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(path / "exits.safetensors")
    return {name: tensor for name, tensor in tensors.items() if ".gate." in name}


def test_gates_are_added_at_the_end(tune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, output = tmp_path / "plain", tmp_path / "run"
    assert tune(plain, gate=False)[0] == 0
    status, said = tune(output)
    assert status == 0 and "Gates of adapter, fitted on" in said
    assert all(torch.equal(tensor, all_tensors(plain, 2)[key]) for key, tensor in all_tensors(output, 2).items())
    found = gates(output / "adapter")
    assert found.keys() == {"exits.2.gate.weight", "exits.2.gate.bias"} and found["exits.2.gate.weight"].abs().max() > 0
    best = gates(output / "adapter-best")
    assert all(torch.equal(found[name], best[name]) for name in found)  # of the same step
    before, after = (json.loads((each / "adapter-best" / "exits.json").read_text()) for each in (plain, output))
    assert after["validation_loss"] == before["validation_loss"] and after["exits"][0]["gate"]
    assert not gates(plain / "adapter") and not before["exits"][0]["gate"]

    # Resumed after the last step, as after a kill before the gates were added.
    status, said = tune(plain, "--resume")
    assert status == 0 and "Gates of" in said
    assert all(torch.equal(found[name], tensor) for name, tensor in gates(plain / "adapter").items())
    assert gates(plain / "adapter-best").keys() == found.keys()

    # A kill between the two adapters loses neither.
    save = tuning_gates.save_adapter

    def killed(path: Path, *arguments: Any, **named: Any) -> None:
        if path.name == "adapter-best":
            raise KeyboardInterrupt
        save(path, *arguments, **named)

    third = tmp_path / "third"
    monkeypatch.setattr(tuning_gates, "save_adapter", killed)
    assert tune(third)[0] != 0
    assert gates(third / "adapter").keys() == found.keys() and not gates(third / "adapter-best")
    monkeypatch.setattr(tuning_gates, "save_adapter", save)
    assert tune(third, "--resume")[0] == 0
    assert all(torch.equal(found[name], tensor) for name, tensor in gates(third / "adapter-best").items())
