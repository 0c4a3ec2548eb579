"""The commands on a quantised release: tuned, evaluated and decoded with packed weights, as with expanded ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_ee.testing import quantised as recipes
from megatron_ee.testing.project import Project
from megatron_ee.testing.quantised import save_quantised_model


@pytest.mark.slow
def test_packed_and_expanded_weights_give_the_same_files_and_texts(project: Project, tmp_path: Path) -> None:
    model = tmp_path / "model"
    vocabulary = json.loads((project.model / "config.json").read_text())["vocab_size"]
    save_quantised_model("llama3.1", model, recipes.gptq(), vocab_size=vocabulary)
    for file in project.model.glob("*token*"):
        shutil.copy(file, model)
    config = project.config(tmp_path / "run.yaml", model={"path": str(model)})
    runs = {weights: tmp_path / weights for weights in ("packed", "expanded")}
    for weights, output in runs.items():
        project.run("tune", "--config", config, "--output", output, "--model.weights", weights)
    tuned = [(output / "adapter" / "exits.safetensors").read_bytes() for output in runs.values()]
    assert tuned[0] == tuned[1]
    found = []
    for weights in runs:
        given = ("--model", model, "--adapter", runs["packed"] / "adapter", "--weights", weights, "--json")
        quality = json.loads(project.run("evaluate", *given, "--data", project.held_out).stdout)
        answer = json.loads(project.run("generate", *given, "--prompt", "one", "--mode", "speculative").stdout)
        found.append((quality["final_loss"], quality["exits"], answer["token_ids"]))
    assert found[0] == found[1]
    refused = project.run("generate", "--model", model, "--prompt", "one", "--compile", check=False)
    assert refused.returncode == 2 and "--weights" in refused.stderr and "expanded" in refused.stderr


@pytest.mark.slow
def test_a_plain_model_is_quantised_as_it_is_loaded(project: Project, tmp_path: Path) -> None:
    config, output = project.config(tmp_path / "run.yaml"), tmp_path / "run"
    project.run("tune", "--config", config, "--output", output, "--model.quantise", "int8")
    resumed = project.run("tune", "--config", config, "--output", output, "--resume", check=False)
    assert resumed.returncode == 1 and "model.quantise" in resumed.stderr
    given = ("--model", project.model, "--adapter", output / "adapter")
    measured = [
        project.run("evaluate", *given, "--data", project.held_out, "--json", "--quantise", kind)
        for kind in ("none", "int8")
    ]
    losses = [json.loads(each.stdout)["final_loss"] for each in measured]
    assert 0 < abs(losses[0] - losses[1]) < 0.05 * losses[0]
    # With another setting, each command that uses the exits says so.
    answered = project.run("generate", *given, "--prompt", "one", "--max-tokens", "2")
    again = project.run("tune", "--config", config, "--output", tmp_path / "again", "--init-adapter", given[-1])
    said = "none, but the exits in"
    assert [said in each.stderr for each in (*measured, answered, again)] == [True, False, True, True]
    assert f"model.quantise: {said}" in again.stderr
