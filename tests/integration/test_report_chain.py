"""The real commands on a tiny model, and a page of what they left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ee.testing.project import Project


@pytest.mark.slow
def test_a_page_of_what_the_commands_leave(project: Project, tuned: Path, tmp_path: Path) -> None:
    exits = ("--model", project.model, "--adapter", tuned / "adapter-best", "--dtype", "float32")
    questions = tmp_path / "questions.jsonl"
    names = ("left", "right")
    records = [{"prompt": f"def f{i}(", "references": ["self"], "group": names[i % 2]} for i in range(30)]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    certificate, evaluation, corpus = tmp_path / "certificate.json", tmp_path / "eval", tmp_path / "corpus-eval"
    wanted = ("--risk", 0.6, "--delta", 0.3, "--loss", "rouge", "--max-tokens", 12, "--output", certificate)
    project.run("calibrate", *exits, "--data", questions, *wanted)
    chosen = ("--calibration", certificate) if json.loads(certificate.read_text())["policy"] else ()
    settings = ("--thresholds", 0.02, 0.5, "--max-tokens", 12, *chosen, "--by", "group", "--output", evaluation)
    project.run("evaluate", *exits, "--tasks", questions, *settings)
    project.run("evaluate", *exits, "--data", project.held_out, "--sequence-length", 32, "--output", corpus)
    log = tmp_path / "exits.jsonl"
    log.write_text(json.dumps({"number": 0, "id": "r0", "audit": {"loss": 0.0, "certificate": "f" * 64}}) + "\n")
    measured = ("--evaluation", evaluation, corpus, "--calibration", certificate)
    for language in ("en", "ja"):
        page = tmp_path / f"{language}.html"
        done = project.run("report", "--run", tuned, *measured, "--language", language, "--output", page)
        assert done.stdout == f"{page}\n" and done.stderr == ""
        text = page.read_text()
        assert "left" in text and "right" in text and str(certificate) in text and "<svg" in text
        assert ("answers differ from full mode" if language == "en" else "件がフルモードと異なります") in text
    sessions = [json.loads(line) for line in (tuned / "log.jsonl").read_text().splitlines() if '"session"' in line]
    assert len(sessions) == 1 and sessions[0]["session"]["processes"] == 1 and sessions[0]["session"]["seconds"] > 0
    other = project.run(
        "report", "--run", tuned, "--evaluation", evaluation, "--calibration", log, "--output", page, check=False
    )
    assert other.returncode == 1 and other.stderr.count("\n") == 1 and "exits.jsonl" in other.stderr
