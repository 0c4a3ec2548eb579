"""``megatron-ee probe`` as a user runs it, on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_ee.commands.main import main
from megatron_ee.testing.project import Project


def probed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["probe", "--budget", "0.2", "--json", *map(str, arguments)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_layers_that_add_nothing_are_found(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text, output = tmp_path / "model", tmp_path / "short.txt", tmp_path / "out"
    shutil.copytree(project.model, model)
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        layer_3_or_4 = name.startswith(("model.layers.2.", "model.layers.3."))
        if layer_3_or_4 and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
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
    assert "tokenising" not in err and out.rstrip().splitlines()[-1].startswith("Exits ")


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
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "probe runs in one process" in refused(2, "--data", project.train)


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
    assert main([*line, str(tmp_path / "out" / "probe.json")]) == 0
    assert "Agreement since the probe" in capsys.readouterr().out
    (tmp_path / "other.json").write_text('{"layers": [{"layer": 1}]}')
    assert main([*line, str(tmp_path / "other.json")]) == 1
    assert "other.json: layers" in capsys.readouterr().err.splitlines()[-1]
