"""``megatron-ee quickstart``: the whole cycle on a tiny model, in the dtype that this machine is fast in."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ee import platform
from megatron_ee.commands.main import main
from megatron_ee.commands.quickstart import _beginnings

cpu_only = pytest.mark.skipif(platform.has_accelerator(), reason="of CPUs")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    line = json.dumps({"text": "a quick brown fox jumps over the lazy dog, and some words follow " * 20})
    path.write_text(f"{line}\n" * 60, encoding="utf-8")
    return path


@cpu_only
@pytest.mark.parametrize("instructions", [pytest.param(True, marks=pytest.mark.slow), False])
def test_cycle(
    instructions: bool,
    project: Any,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(project.cache))
    if not instructions:
        monkeypatch.setattr(platform, "multiplies_bfloat16", lambda: False)
    fast = platform.multiplies_bfloat16()
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(project.model, base)
    AutoModelForCausalLM.from_pretrained(project.model, dtype=torch.bfloat16).save_pretrained(base)
    given = ["--base", base, "--data", text, "--held-out", text, "--out", out, "--steps", 2]
    assert main(["quickstart", *map(str, given)]) == 0
    assert json.loads((out / "tune.yaml").read_text())["model"]["dtype"] == ("bfloat16" if fast else "float32")
    report = json.loads((out / "report.json").read_text())
    assert report["backbone_sha256_before"] == report["backbone_sha256_after"]
    shown = capsys.readouterr()
    assert "backbone unchanged" in shown.out and "model.dtype" not in shown.err
    assert shown.out.count("$ megatron-ee") == 5
    if instructions:  # again, in the place of the first
        assert main(["quickstart", *map(str, given)]) == 0


def test_prompts_are_the_beginnings_of_texts(project: Any, tmp_path: Path) -> None:
    """Also of texts so short that their end of text is among the first tokens; it is none of the text."""
    path, texts = tmp_path / "text.jsonl", ["short", "a somewhat longer text than that before"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepared = ["--input", path, "--tokenizer", project.model, "--output", tmp_path / "corpus"]
    assert main(["prepare-data", *map(str, prepared)]) == 0
    short, longer = _beginnings(tmp_path / "corpus", project.model)
    assert short == "short" and texts[1].startswith(longer) and longer


def test_a_signal_while_tuning_ends_it(
    project: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """tune itself saves and ends well."""
    done = []

    def run(*words: object) -> None:
        done.append(words[0])
        if words[0] == "tune":
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr("megatron_ee.commands.quickstart._command", run)
    given = ["--base", project.model, "--data", text, "--held-out", text, "--out", tmp_path / "out"]
    assert main(["quickstart", *map(str, given)]) == 128 + signal.SIGUSR1
    assert "megatron-ee quickstart: interrupted by SIGUSR1" in capsys.readouterr().err
    assert done == ["prepare-data", "prepare-data", "tune"]


def test_a_directory_of_others_is_kept(
    project: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "tuning").mkdir(parents=True)
    (out / "tuning" / "mine").touch()
    given = ["--base", project.model, "--data", text, "--held-out", text, "--out", out]
    assert main(["quickstart", *map(str, given)]) == 2
    assert "--out: " in capsys.readouterr().err
    assert [path.name for path in out.rglob("*")] == ["tuning", "mine"]


@cpu_only
def test_a_slow_dtype_is_told(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "multiplies_bfloat16", lambda: False)
    for dtype in ("bfloat16", "float32"):
        config = project.config(tmp_path / "run.yaml", tuning={"steps": 1}, model={"dtype": dtype})
        assert main(["tune", "--config", str(config), "--output", str(tmp_path / dtype)]) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("model.dtype: ")]
        assert len(told) == (dtype == "bfloat16")
