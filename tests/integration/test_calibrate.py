"""``megatron-ee calibrate`` that is killed and continued, on the exits of a run whose corpus is known."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.testing.project import Project


def command(project: Project, tuned: Path, data: Path, output: Path) -> list[Any]:
    model = ("--model", project.model, "--adapter", tuned / "adapter", "--dtype", "float32", "--data", data)
    wanted = ("--risk", 0.5, "--delta", 0.2, "--loss", "rouge", "--max-tokens", 24, "--max-num-seqs", 2)
    return ["calibrate", *model, *wanted, "--output", output]


@pytest.mark.slow
def test_a_killed_calibration_continues_with_the_same_result(project: Project, tuned: Path, tmp_path: Path) -> None:
    data, output, partial = (
        tmp_path / "sample.jsonl",
        tmp_path / "certificate.json",
        tmp_path / "certificate.json.partial",
    )
    data.write_text("".join(json.dumps({"id": str(i), "prompt": f"def f{i}("}) + "\n" for i in range(30)))
    whole = tmp_path / "whole.json"
    project.run(*command(project, tuned, data, whole))
    with project.start(*command(project, tuned, data, output)) as killed:
        while not (partial.is_file() and partial.read_bytes().count(b"\n") >= 5):
            assert killed.running
            time.sleep(0.01)
        killed.send(signal.SIGKILL)
        killed.wait()
    assert not output.exists()
    refused = project.run(*command(project, tuned, data, output), check=False)
    assert refused.returncode == 2 and "is unfinished; give --resume" in refused.stderr
    other = project.run(*command(project, tuned, data, output), "--resume", "--seed", 1, check=False)
    assert other.returncode == 2 and "was begun with seed 0, not 1" in other.stderr
    kept = partial.read_bytes().splitlines()[:5]
    project.run(*command(project, tuned, data, output), "--resume")
    assert len(kept) == 5 and not partial.exists()
    certificates = [{**json.loads(path.read_text()), "date": None} for path in (whole, output)]
    assert certificates[0] == certificates[1] and certificates[0]["overlap"] == "none"


def test_prompts_of_the_training_corpus_are_refused(project: Project, tuned: Path, tmp_path: Path) -> None:
    """The corpus holds two texts; a prompt equals the first line of one."""
    first = json.loads((project.model.parent / "train.jsonl").read_text().splitlines()[0])["text"].splitlines()[0]
    data = tmp_path / "sample.jsonl"
    prompts = [first, *(f"def f{i}(" for i in range(29))]
    data.write_text("".join(json.dumps({"id": str(i), "prompt": prompt}) + "\n" for i, prompt in enumerate(prompts)))
    done = project.run(*command(project, tuned, data, tmp_path / "certificate.json"), check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "sample.jsonl:1: 1 of its 30 prompts are in" in done.stderr and "--allow-overlap" in done.stderr
