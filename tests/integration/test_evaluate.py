"""``megatron-ee evaluate`` as a user runs it: the figures of the run's own validation, as JSON, table and plots."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.checkpoint.ownership import MARKER
from megatron_ee.commands.main import main
from megatron_ee.testing.project import Project, changed_model, read_log

WINDOWS = ("--sequence-length", 32, "--sequences", 16, "--dtype", "float32")


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_what_others_wrote_is_refused_before_the_model_is_opened(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.png").write_text("a picture")
    place = tmp_path if option == "--output" else tmp_path / "mine.png"
    assert main(["evaluate", "--model", "no-model", "--data", "no-data", option, str(place)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and option in errors and "mine.png" in errors
    assert (tmp_path / "mine.png").read_text() == "a picture" and len(list(tmp_path.iterdir())) == 1


def test_it_measures_what_validation_did(project: Project, tuned: Path, tmp_path: Path) -> None:
    exits = ("--model", project.model, "--adapter", tuned / "adapter", "--data", project.held_out)
    found = json.loads(project.run("evaluate", *exits, *WINDOWS, "--json", "--output", tmp_path / "out").stdout)
    validated: Any = next(line for line in read_log(tuned) if line["step"] == 12 and "validation" in line)["validation"]
    assert found["final_loss"] == pytest.approx(validated["final_loss"], rel=1e-5)
    assert [exit_["layer"] for exit_ in found["exits"]] == [1, 2, 3]
    for exit_, reference in zip(found["exits"], validated["exits"], strict=True):
        for name in ("loss", "agreement", "mean_confidence", "ece"):
            assert exit_[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-6), name
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        MARKER,
        "evaluation.json",
        "evaluation.png",
        "reliability.png",
    }
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["final_loss"] == found["final_loss"] and written["exits"] == found["exits"]


def test_a_corpus_of_another_tokenizer_is_refused(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(project.model, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFKC"}
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert main(["evaluate", "--model", str(other), "--data", str(project.held_out), *map(str, WINDOWS)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"prepare it again with --tokenizer {other}" in error


def test_exits_of_another_model_are_refused(
    project: Project, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, message in (
        (changed_model(project, tmp_path / "weights", bias=0.5), "exits fit only the weights they were tuned on"),
        (changed_model(project, tmp_path / "settings", settings={"rms_norm_eps": 1e-6}), "norm_eps (1e-05 against"),
    ):
        options = ("--adapter", tuned / "adapter", "--data", project.held_out, *WINDOWS)
        assert main(["evaluate", "--model", model, *map(str, options)]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_model_without_exits_has_its_final_one(project: Project, tuned: Path, tmp_path: Path) -> None:
    model = ("--model", project.model, "--data", project.held_out)
    done = project.run("evaluate", *model, *WINDOWS, "--output", tmp_path, "--plot", tmp_path / "sweep.png")
    assert "final" in done.stdout and "no exits to sweep" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARKER, "evaluation.json"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["exits"] == []
    refused = project.run("evaluate", *model, "--sequence-length", 10**6, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--sequence-length" in refused.stderr
