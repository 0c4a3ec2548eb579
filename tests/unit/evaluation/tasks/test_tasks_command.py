"""``megatron-ee evaluate --tasks`` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.checkpoint.journal import Journal
from megatron_ee.checkpoint.ownership import MARKER
from megatron_ee.commands.main import main

LINES: list[dict[str, Any]] = [
    {"prompt": "say a", "references": ["a"], "task": "words", "group": "g"},
    {"prompt": "say b", "references": ["b", "c"], "task": "words"},
    {"prompt": "or", "choices": ["yes", "no"], "answer": 1, "task": "choices"},
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def evaluate(model: Path, tasks: Path, *options: object) -> int:
    given = ["--model", model, "--tasks", tasks, "--dtype", "float32", "--max-tokens", 6, *options]
    return main(["evaluate", *map(str, given)])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.smoke
def test_every_mode_and_threshold_is_compared(
    byte_model: Path, adapter: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits, output = ("--adapter", adapter, "--thresholds", 2, 0.01), tmp_path / "out"
    assert evaluate(byte_model, tasks, *exits, "--json", "--output", output, "--plot", tmp_path / "plot.svg") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["overall"]) == ["full", "speculative", "threshold 0.01", "threshold 2"]
    assert list(found["tasks"]) == ["words", "choices"]
    for name in ("speculative", "threshold 2"):
        scores = found["overall"][name]["scores"]
        assert {score: each["difference"] for score, each in scores.items()} == dict.fromkeys(scores, 0.0)
    assert found["overall"]["threshold 0.01"]["layers_per_token"] < 4 == found["overall"]["full"]["layers_per_token"]
    assert found["timing"]["rows"] == 2
    assert {path.name for path in output.iterdir()} == {
        MARKER,
        "answers.jsonl",
        "answers.jsonl.info.json",
        "tasks.json",
        "tasks.png",
    }
    written = json.loads((output / "tasks.json").read_text())
    assert {key: written[key] for key in found} == found and len(written["rows"]) == 3
    made_from = json.loads((output / "answers.jsonl.info.json").read_text())
    assert found["files"] == made_from["files"] == [str(tasks)]
    assert found["options"] == made_from["settings"] and found["options"]["dtype"] == "float32"
    assert [each["name"] for each in found["settings"]] == list(found["overall"])
    assert (tmp_path / "plot.svg").exists()
    # a finished evaluation is shown again with --resume, and replaced with --overwrite
    before = (output / "answers.jsonl").read_bytes()
    assert evaluate(byte_model, tasks, *exits, "--json", "--output", output, "--resume") == 0
    assert json.loads(capsys.readouterr().out) == found and (output / "answers.jsonl").read_bytes() == before
    assert evaluate(byte_model, tasks, *exits[:2], "--thresholds", 0.5, "--output", output, "--overwrite") == 0
    assert "Quality beside speed (3 records of 2 tasks)" in capsys.readouterr().out
    assert "threshold 0.01" not in (output / "answers.jsonl").read_text()


def test_a_model_without_exits_has_full_mode(byte_model: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(byte_model, tasks, "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["overall"]) == ["full"]
    assert evaluate(byte_model, tasks, "--thresholds", 0.5) == 2
    assert "--thresholds: there are no exits; give their adapter with --adapter" in last_line(capsys)


def test_prompts_alone_are_compared_with_full_mode(
    byte_model: Path, adapter: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert evaluate(byte_model, tasks, "--adapter", adapter, "--thresholds", 2, "--json") == 0
    out, err = capsys.readouterr()
    assert "tasks: no references or choices, so only agreement and speed are measured" in err
    scores = json.loads(out)["overall"]["threshold 2"]["scores"]
    assert {name: each["mean"] for name, each in scores.items()} == {
        "equal_answers": 1.0,
        "tokens_before_departure": 1.0,
        "equal_tokens": 1.0,
    }


def test_an_interrupted_evaluation_is_continued(
    byte_model: Path,
    adapter: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    exits = ("--adapter", adapter)
    assert evaluate(byte_model, tasks, *exits, "--output", whole) == 0
    finished = (whole / "tasks.json").read_bytes()
    assert evaluate(byte_model, tasks, *exits, "--output", whole, "--stop", "x") == 2
    assert "whole holds a finished evaluation; give --resume to show it again, --overwrite" in last_line(capsys)
    assert (whole / "tasks.json").read_bytes() == finished
    append = Journal.append

    def interrupted(journal: Journal, entry: Any) -> None:
        append(journal, entry)
        if len(journal.places) == 5:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", interrupted)
        assert evaluate(byte_model, tasks, *exits, "--output", output) == 128 + signal.SIGINT
    assert "the same command with --resume continues" in capsys.readouterr().err
    assert not (output / "tasks.json").exists()
    assert evaluate(byte_model, tasks, *exits, "--output", output) == 2
    assert "answers.jsonl is unfinished; give --resume to continue it, or --overwrite" in last_line(capsys)
    assert evaluate(byte_model, tasks, *exits, "--output", output, "--resume", "--stop", "x") == 2
    assert 'answers.jsonl was begun with stop [], not ["x"]' in last_line(capsys)
    assert evaluate(byte_model, tasks, *exits, "--output", output, "--resume", "--quantise", "int8") == 2
    assert 'was begun with quantise null, not "int8"' in last_line(capsys)
    info = output / "answers.jsonl.info.json"
    kept = json.loads(info.read_text())
    info.write_text(json.dumps({**kept, "settings": {**kept["settings"], "quantise": "int8"}}))
    assert evaluate(byte_model, tasks, *exits, "--output", output, "--resume") == 2
    assert 'was begun with quantise "int8", not null' in last_line(capsys)
    info.write_text(json.dumps(kept))
    tasks.write_text(tasks.read_text() + json.dumps({**LINES[0], "id": "new"}) + "\n")
    assert evaluate(byte_model, tasks, *exits, "--output", output, "--resume") == 2
    assert "was begun with other records" in last_line(capsys)
    tasks.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert evaluate(byte_model, tasks, "--output", output, "--resume") == 2
    assert "was begun with another adapter" in last_line(capsys)
    assert evaluate(byte_model, tasks, *exits, "--output", output, "--resume") == 0
    found, expected = (json.loads((path / "tasks.json").read_text())["rows"] for path in (output, whole))
    for rows in (found, expected):  # drafts are chosen by measured time
        assert all(row["settings"].pop("speculative") for row in rows)
    assert found == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "corpus"), "argument --data: not allowed with argument --tasks"),
        (("--speed",), "--speed: is an option of --data"),
        (("--resume",), "--resume and --overwrite: need --output"),
        (("--policy", "gate"), "--policy: no exit has a gate, which gate needs; tune exits with gate: true"),
        (("--thresholds", "0"), "--thresholds: must be above 0, not 0"),
        (("--plot", "x.txt"), "--plot: x.txt must end in one of"),
        (("--tensor", "2"), "--tensor x pipeline: 2 x 1 needs 2 processes"),
    ],
)
def test_bad_options_are_refused(
    options: tuple[str, ...],
    message: str,
    byte_model: Path,
    adapter: Path,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_ee.inference.loading.open_engine", lambda *_, **__: pytest.fail("loaded"))
    assert evaluate(byte_model, tasks, "--adapter", adapter, *options) == 2
    assert message.removeprefix("--tensor ") in last_line(capsys)


def test_a_bad_record_is_refused_before_the_model_is_loaded(
    byte_model: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ee.inference.loading.open_engine", lambda *_, **__: pytest.fail("loaded"))
    tasks.write_text(tasks.read_text() + '{"prompt": "x", "refs": []}\n')
    assert evaluate(byte_model, tasks) == 2
    found = capsys.readouterr().err
    assert f"megatron-ee evaluate: error: {tasks}:4: refs: unknown key" in found and found.count("\n") == 1


def test_options_of_tasks_need_tasks(byte_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(byte_model), "--data", "x", "--max-tokens", "3"]) == 2
    assert "--max-tokens: is an option of --tasks" in last_line(capsys)
    assert main(["evaluate", "--model", str(byte_model)]) == 2
    assert "one of the arguments --data --tasks is required" in last_line(capsys)


def test_a_missing_file_is_named(byte_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(byte_model, tmp_path / "none.jsonl") == 2
    assert f"no such file or directory: {tmp_path / 'none.jsonl'}" in last_line(capsys)
