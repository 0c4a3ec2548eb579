"""``tune`` with gates: what is written, what a resumed run does, and that tuning itself does not change."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ee.checkpoint.adapter import Adapter, open_adapter
from megatron_ee.checkpoint.loading import load_exits
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.checkpoint.store import open_checkpoint
from megatron_ee.commands.main import main
from megatron_ee.config.load import load_config
from megatron_ee.config.schema import RunConfig
from megatron_ee.data.loader import open_data
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import Groups, process_groups
from megatron_ee.testing.project import all_tensors
from megatron_ee.tuning import finish
from megatron_ee.tuning import gates as tuning_gates
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.gates import fit_gates, read_gate_tokens
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.teacher import TopTokens

SHORT = {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2}
DISTILS = {
    "loss": {"distillation": {"kl": 1.0, "top_k": 8}},
    "tuning": {**SHORT, "steps": 3},
    "validation": {"interval": 2, "sequences": 4},
    "checkpoint": {"interval": 1},
    "fit": {"tokens": 600},
}
"""Validated after steps 0, 2 and 3, and saved after 1, 2 and 3."""
Run = Callable[..., tuple[int, str]]


def exits(*, gate: bool) -> list[dict[str, Any]]:
    return [{"layer": 2, "body": "norm", "gate": gate}, {"layer": 3, "body": "norm", "head": "shared"}]


@pytest.fixture
def tune(project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``tune``; gives the exit status and stderr."""
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(project.cache))

    def run(output: Path, *arguments: object, gate: bool = True, **changes: Any) -> tuple[int, str]:
        values = {
            "exits": exits(gate=gate),
            "tuning": SHORT,
            "validation": {"interval": 0, "sequences": 4},
            "logging": {"tensorboard": False},
        }
        config = project.config(tmp_path / "run.yaml", **{**values, **changes})
        status = main(["tune", "--config", str(config), "--output", str(output), *map(str, arguments)])
        return status, capsys.readouterr().err

    return run


def gates(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(path / "exits.safetensors")
    return {name: tensor for name, tensor in tensors.items() if ".gate." in name}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_gates_are_added_at_the_end(tune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, output = tmp_path / "plain", tmp_path / "run"
    assert tune(plain, gate=False)[0] == 0
    status, said = tune(output)
    assert status == 0 and "Gates of adapter and adapter-best, fitted on" in said
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
    save = finish.save_adapter

    def killed(path: Path, *arguments: Any, **named: Any) -> None:
        if path.name == "adapter-best":
            raise KeyboardInterrupt
        save(path, *arguments, **named)

    third = tmp_path / "third"
    monkeypatch.setattr(finish, "save_adapter", killed)
    assert tune(third)[0] != 0
    assert gates(third / "adapter").keys() == found.keys() and not gates(third / "adapter-best")
    monkeypatch.setattr(finish, "save_adapter", save)
    assert tune(third, "--resume")[0] == 0
    assert all(torch.equal(found[name], tensor) for name, tensor in gates(third / "adapter-best").items())


@pytest.mark.slow
def test_a_run_that_distils_fits_gates_while_tuning(tune: Run, project: Any, tmp_path: Path) -> None:
    """Before each validation and save, once for a step, and every adapter has the gates of its own exits."""
    plain, output = tmp_path / "plain", tmp_path / "run"
    assert tune(plain, gate=False, **DISTILS)[0] == 0
    status, said = tune(output, **DISTILS)
    assert status == 0 and "Gates of" not in said
    assert re.findall(r"Gates after step (\d+), fitted on", said) == ["1", "2", "3"]
    names = {"exits.2.gate.weight", "exits.2.gate.bias"}
    state, without = all_tensors(output, 3), all_tensors(plain, 3)
    assert state.keys() - without.keys() == names
    assert all(torch.equal(tensor, state[key]) for key, tensor in without.items())
    assert open_checkpoint(output / "checkpoints" / "step-3").metadata["progress"]["gates_step"] == 3

    config = load_config(tmp_path / "run.yaml")
    paths = [output / "adapter", output / "adapter-best", output / "checkpoints" / "step-2"]
    assert not same(gates(output / "adapter"), saved_gates(paths[2]))
    with process_groups() as groups:
        for path in paths:
            weight, bias = fitted_alone(config, open_adapter(path), groups)
            assert weight.abs().max() > 0
            assert same(saved_gates(path), {"exits.2.gate.bias": bias, "exits.2.gate.weight": weight})


def fitted_alone(config: RunConfig, adapter: Adapter, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the gate after layer 2, fitted to the exits of an adapter on the tokens after its step."""
    model = open_model(config.model.path)
    setup = build_setup(model.architecture, torch.float32, groups)
    stage, layout = FullModel(setup, model, Interrupt()).with_exits(adapter.exits)
    load_exits(stage.exits, adapter, model)
    gate = stage.exits[0].gate
    assert gate is not None
    gate.place(torch.zeros(65))
    blend, _ = open_data(config.data, None)
    tokens = read_gate_tokens(config, blend, setup, Interrupt(), adapter.steps * SHORT["global_batch_size"])
    taught = Pipeline(stage, layout, adapter.exits, teacher=TopTokens(1))
    fit_gates(taught, [stage.exits], tokens, config.loss.chunk_tokens, Interrupt())
    return gate.weight.detach(), gate.bias.detach()


def saved_gates(path: Path) -> dict[str, torch.Tensor]:
    """Of an adapter or a training checkpoint."""
    weights = open_adapter(path).weights
    return {
        name: torch.cat([slab.clone() for slab in weights[name].slabs()])
        for name in sorted(weights)
        if ".gate." in name
    }


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_a_signal_ends_the_fit_of_gates_which_the_resumed_run_does_again(
    step: int, tune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a save, and after the last step before the validation."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert tune(straight, **DISTILS)[0] == 0
    read = tuning_gates.read_gate_tokens

    def signalled(config: Any, blend: Any, setup: Any, interrupt: Any, start: int = 0) -> Any:
        if start == step * SHORT["global_batch_size"] and not interrupt.requested:
            signal.raise_signal(signal.SIGTERM)
        return read(config, blend, setup, interrupt, start)

    with monkeypatch.context() as patch:
        patch.setattr(tuning_gates, "read_gate_tokens", signalled)
        assert tune(broken, **DISTILS)[0] == 0
    assert json.loads((broken / "status.json").read_text())["step"] == step
    described = json.loads((broken / "adapter" / "exits.json").read_text())
    assert described["steps"] == step and not described["exits"][0]["gate"] and not gates(broken / "adapter")

    status, said = tune(broken, "--resume", **DISTILS)
    assert status == 0 and "Gates of" not in said
    assert re.findall(r"Gates after step (\d+), fitted on", said) == (["2", "3"] if step == 1 else ["3"])
    for name in ("adapter", "adapter-best"):
        found, expected = (load_file(run / name / "exits.safetensors") for run in (broken, straight))
        assert same(found, expected)


@pytest.mark.slow
def test_gates_that_a_run_never_had_are_fitted_when_it_is_resumed(tune: Run, tmp_path: Path) -> None:
    straight, output = tmp_path / "straight", tmp_path / "run"
    assert tune(straight, **DISTILS)[0] == tune(output, gate=False, **DISTILS)[0] == 0
    assert tune(output, "--resume", **DISTILS)[0] == 0
    assert same(gates(output / "adapter"), gates(straight / "adapter")) and gates(output / "adapter-best")

    # And the other way round, without distillation, the state's gates are left out.
    assert tune(straight, "--resume", gate=False, **DISTILS)[0] == 0
    assert not gates(straight / "adapter")


def test_fitted_exits_get_gates_before_the_first_step(tune: Run, tmp_path: Path) -> None:
    output, fitted = tmp_path / "run", [{"layer": 2, "head": "shared", "gate": True}]
    none = {**DISTILS, "tuning": {**SHORT, "steps": 0}, "exits": fitted}
    status, said = tune(output, **none)
    assert status == 0 and said.count("Gates after step 0") == 1
    assert same(gates(output / "adapter"), gates(output / "adapter-best")) and gates(output / "adapter")
    assert not gates(output / "adapter-initial")

    for name in ("checkpoints", "adapter"):
        shutil.rmtree(output / name)
    status, said = tune(output, "--resume", **none)
    assert status == 0 and "exits are fitted already" in said


def test_a_debug_run_fits_gates(tune: Run, tmp_path: Path) -> None:
    status, said = tune(tmp_path / "run", "--debug", **DISTILS)
    assert status == 0 and "debug: passed" in said and "Gates after step 3" in said
    assert "gate.weight: [64] float32, fitted" in (tmp_path / "run" / "debug" / "debug.log").read_text()


@pytest.mark.slow
def test_tuned_gates_are_evaluated_on_a_corpus_and_on_tasks(
    tune: Run, project: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(tmp_path / "run")[0] == 0
    files = ("--model", project.model, "--adapter", tmp_path / "run" / "adapter")

    def evaluate(*options: object) -> Any:
        assert main(["evaluate", *map(str, (*files, *options)), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    setting = {"exits": [2], "agreement": 0.95, "seconds": 1.0, "speedup": 1.2, "early": 0.5, "threshold": 1e-6}
    probe = {"layers": [], "threshold": [], "speculative": setting, "gate": [{**setting, "at_least": 0.95}]}
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    corpus = ("--data", project.held_out, "--sequence-length", 32, "--sequences", 4)
    found = evaluate(*corpus, "--speed", "--probe", tmp_path / "probe.json")
    assert [each["layer"] for each in found["exits"]] == [2, 3]
    gate = found["speed"][-1]
    assert (gate["mode"], gate["threshold"], gate["forecast"]) == ("gate", 1e-6, 1.2) and gate["layers_per_token"] < 4

    records = [{"prompt": f"def f{n}", "references": ["x"], "group": "ab"[n % 2]} for n in range(4)]
    records.append({"prompt": "a =", "choices": ["one word", "two"], "answer": 0, "task": "choices"})
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    tasks = ("--tasks", tmp_path / "tasks.jsonl", "--policy", "threshold", "gate", "--thresholds", 1e-6, 2)
    found = evaluate(*tasks, "--max-tokens", 6, "--by", "group", "--output", tmp_path / "out")
    both = [f"{policy} {threshold}" for policy in ("threshold", "gate") for threshold in ("1e-06", "2")]
    assert list(found["overall"]) == ["full", "speculative", *both] and list(found["groups"]) == both
    settings = {each["name"]: each for each in found["settings"]}
    assert settings["gate 1e-06"]["exits"] == [2]  # the one with a gate
    assert 2 < found["overall"]["gate 1e-06"]["exit_layer"] < 4
    for name in ("gate 2", "threshold 2"):
        assert found["overall"][name]["exit_layer"] == 4
        assert {each["difference"] for each in found["overall"][name]["scores"].values()} == {0.0}
    assert (tmp_path / "out" / "tasks.png").is_file()
