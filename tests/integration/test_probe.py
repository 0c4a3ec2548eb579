"""``megatron-ee probe`` as a user runs it, on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_ee.commands.main import main
from megatron_ee.testing.examples import MODELS
from megatron_ee.testing.project import Project


def probed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["probe", "--budget", "0.2", "--json", *map(str, arguments)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def settled(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers 3 and 4, of 4, add nothing."""
    model = tmp_path_factory.mktemp("settled") / "model"
    shutil.copytree(project.model, model)
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        layer_3_or_4 = name.startswith(("model.layers.2.", "model.layers.3."))
        if layer_3_or_4 and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_layers_that_add_nothing_are_found(settled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, output = settled, tmp_path / "short.txt", tmp_path / "out"
    text.write_text("Too little to fit an MLP on, so norms stand in. " * 6)
    found = probed(capsys, "--model", model, "--data", text, "--output", output)
    first, *others = found["layers"]
    assert found["work"]["body"] == "norm" and first["layer"] == 1 and first["agreement"] < 1
    for each in others:  # h is the last hidden state already
        assert each["agreement"] == 1.0 and each["loss"] == pytest.approx(found["final_loss"], rel=1e-4)
    assert found["speculative"]["speedup"] > 1 and found["speculative"]["draft_length"] >= 1
    assert set(found["milliseconds"]["layer"]) == {"1", "2", "4", "8", "16"}
    assert all(value > 0 for part in found["milliseconds"].values() for value in part.values())
    assert "They were norm exits" in found["judgement"]
    assert json.loads((output / "probe.json").read_text()) == found
    assert main(["probe", "--model", str(model), "--data", str(text), "--output", str(tmp_path)]) == 2


def test_a_corpus_is_read_in_place_and_printed(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--budget", "0.2", "--model", str(project.model), "--data", str(project.train)]) == 0
    out, err = capsys.readouterr()
    assert "Fitted mlp exits on" in out and "Milliseconds of a decoding pass (float32)" in out
    assert "Forecast, not measured" not in out
    assert "tokenising" not in err and out.rstrip().splitlines()[-1].startswith("Exits ")


@pytest.mark.slow
def test_gates_and_another_shape(
    settled: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exits agree, but are never confident: gates find that out, here and for the shape, of which half can be saved."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llama3.1_8b"]))
    given = ("--model", settled, "--data", project.train, "--as-shape", tmp_path, "--budget", 1)
    found = probed(capsys, *given, "--as-shape", tmp_path / "config.json", "--gpu", "l40s")
    first, second = found["shapes"]
    assert first["gpu"] == "NVIDIA L40S" and first["num_layers"] == 32 and first["name"] == str(tmp_path)
    assert [each["at_least"] for each in first["gate"]] == [0.99, 0.95, 0.9] == [x["at_least"] for x in found["gate"]]
    by_gate, by_head = first["gate"][0], first["threshold"][0]
    assert by_gate["gated"] and by_gate["exits"] == [16] and by_gate["early"] > 0.9 and by_gate["speedup"] > 1.5
    assert by_head["exits"] == [] and by_head["speedup"] == 1.0
    assert {"layer": 2, "body": "mlp", "head": "shared", "gate": True} in found["exits"]
    assert {**first, "name": ""} == {**second, "name": ""}
    assert main(["probe", *map(str, given)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"Forecast, not measured: {tmp_path} (32 layers of 0.130 ms, head 0.314 ms) on NVIDIA H100 SXM" in out
    assert "policy gate, 95% equal" in out and "{layer: 2, body: mlp, head: shared, gate: true}" in out


def test_what_cannot_be_probed(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(status: int, *arguments: object) -> str:
        model = () if "--model" in arguments else ("--model", project.model)
        assert main(["probe", *map(str, (*model, *arguments))]) == status
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()[-1]

    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    assert "--budget: must be a positive number" in refused(2, "--data", project.train, "--budget", 0)
    assert "has 10 tokens; give at least 128" in refused(1, "--data", tmp_path / "short.txt")
    assert "chat template" in refused(1, "--data", tmp_path / "chat.jsonl")
    assert "--gpu: has no effect without --as-shape" in refused(2, "--data", project.train, "--gpu", "h100")
    shape = ("--data", project.train, "--as-shape", project.model)
    assert "--gpu: 'h1000' is unknown; possible: h100" in refused(2, *shape, "--gpu", "h1000")
    assert "--as-shape: no such file" in refused(2, "--data", project.train, "--as-shape", tmp_path / "none")
    assert "--pipeline: 9 stages are more than" in refused(2, "--data", project.train, "--pipeline", 9)
    assert "does not divide the 1 running" in refused(2, "--data", project.train, "--tensor", 2)


@pytest.mark.slow
def test_evaluate_compares_with_a_probe(
    project: Project, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probed(capsys, "--model", project.model, "--data", project.train, "--output", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "probe.json").read_text())
    evaluate = ("evaluate", "--model", project.model, "--adapter", tuned / "adapter", "--data", project.held_out)
    line = [*map(str, evaluate), "--sequence-length", "32", "--sequences", "4", "--probe"]
    assert main([*line, str(tmp_path / "out" / "probe.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["layer"], each["probed"], each["agreement"]) for each in found["since_probe"]] == [
        (exit_["layer"], then["agreement"], exit_["agreement"])
        for exit_, then in zip(found["exits"], content["layers"], strict=True)
    ]
    output = ("--output", str(tmp_path / "evaluation"))
    assert main([*line, str(tmp_path / "out" / "probe.json"), "--speed", *output]) == 0
    out = capsys.readouterr().out
    assert "Agreement since the probe" in out and "forecast, probe" in out
    written = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert written["since_probe"] == found["since_probe"]
    full, threshold, speculative = written["speed"]
    assert (full["mode"], full["speedup"], full["agreement"], full["forecast"]) == ("full", 1.0, 1.0, None)
    assert threshold["threshold"] > 0 and threshold["forecast"] == content["threshold"][1]["speedup"]
    assert speculative["forecast"] == content["speculative"]["speedup"] and speculative["agreement"] == 1.0
    assert all(each["tokens_per_second"] > 0 and each["speedup"] > 0 for each in written["speed"])
    (tmp_path / "other.json").write_text('{"layers": [{"layer": 1}]}')
    assert main([*line, str(tmp_path / "other.json")]) == 1
    assert "other.json: layers" in capsys.readouterr().err.splitlines()[-1]
