"""Groups of the records of tasks, as ``evaluate --tasks --by`` shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.commands.main import main
from megatron_ee.evaluation.groups.tasks import NO_GROUP, group_name
from megatron_ee.evaluation.tasks.records import TaskRecord
from megatron_ee.inference.certificate import MADE_BY, VERSION
from megatron_ee.inference.released import open_released, released_digests


def test_groups_of_records(read: Callable[..., list[TaskRecord]]) -> None:
    japanese = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "首都はどこ"}]
    short, long = read({"prompt": "say a", "group": "g"}, {"prompt": "long " * 8})
    conversation = TaskRecord(id="a", task="t", messages=japanese)
    assert [group_name(each, "group") for each in (short, long)] == ["g", NO_GROUP]
    assert [group_name(each, "script") for each in (short, conversation)] == ["Latin", "Japanese"]
    assert [group_name(each, "length") for each in (short, long)] == ["1-32", "33-64"]  # a token per byte


LINES: list[dict[str, Any]] = [
    {"prompt": f"{word} {number}", "references": ["a"], "group": group}
    for word, group, count in (("say", "x", 12), ("tell", "y", 11), ("ask", "z", 2))
    for number in range(count)
]


@pytest.fixture
def evaluate(byte_model: Path, tmp_path: Path) -> Callable[..., int]:
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))

    def run(*options: object) -> int:
        given = ["--model", byte_model, "--tasks", path, "--dtype", "float32", "--max-tokens", 3, *options]
        return main(["evaluate", *map(str, given)])

    return run


def test_groups_are_compared_in_threshold_mode(
    evaluate: Callable[..., int], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, exits = tmp_path / "out", ("--adapter", adapter, "--thresholds", 2)
    assert evaluate(*exits, "--by", "group", "--json", "--output", output) == 0
    found = json.loads(capsys.readouterr().out)["groups"]
    assert list(found) == ["threshold 2"] and found["threshold 2"]["risk"] == "quality difference"
    x, y, z = found["threshold 2"]["groups"]
    assert [each["members"] for each in (x, y, z)] == [12, 11, 2] and z["too_small"] and "agreement" not in z
    assert x["agreement"]["mean"] == 1 == y["agreement"]["p"] and x["exit layer"]["mean"] == 4
    assert found["threshold 2"]["warning"] is None and (output / "groups.png").is_file()
    # Shown again from the same answers, by something else.
    assert evaluate(*exits, "--by", "length", "--output", output, "--resume") == 0
    assert "Groups by tokens of the prompt, threshold 2" in capsys.readouterr().out
    assert evaluate(*exits, "--output", output, "--resume") == 0
    assert not (output / "groups.png").exists(), "it would be of another comparison"
    capsys.readouterr()
    assert evaluate("--by", "group") == 2
    assert "--by: there are no exits" in capsys.readouterr().err


def test_a_certificate_gives_loss_and_its_bound_by_group(
    evaluate: Callable[..., int],
    byte_model: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, released = tmp_path / "certificate.json", open_released(byte_model, adapter)
    decoding = {"chat": bool(released.tokenizer.templates), "max_tokens": 3, "sampling": {}, "dtype": "float32"}
    certificate = {
        **{"made_by": MADE_BY, "version": VERSION, "task": "words", "loss": "disagreement", "p_value": "betting"},
        **{"risk": 0.05, "delta": 0.1, "n": 80, "n_fit": 20, "full_layers": 4, **released_digests(released)},
        **{"policy": {"name": "threshold", "threshold": 2.0, "thresholds": {"1": 1.5}}, "data_sha256": "0" * 64},
        "decoding": {**decoding, "weights": "packed", "quantise": "none"},
        **{"overlap": "none", "seed": 0, "date": "2026-01-01T00:00:00+00:00"},
    }
    path.write_text(json.dumps(certificate))
    options = ("--adapter", adapter, "--thresholds", 0.01, "--by", "group", "--calibration", path)
    assert evaluate(*options, "--json") == 0
    found = json.loads(capsys.readouterr().out)["groups"]
    assert list(found) == ["threshold 0.01", "calibrated"] and found["calibrated"]["risk"] == "loss"
    assert found["calibrated"]["certified"] == {"risk": 0.05, "delta": 0.1}
    x, y, z = found["calibrated"]["groups"]
    assert x["loss"]["mean"] == 0 and z["largest_loss"] is None
    # Without a loss, the risk r is refuted if (1 - r) ** n is at most the level. The bound is rounded up.
    assert 0 <= x["largest_loss"] - (1 - 0.05 ** (1 / 12)) <= 0.01
    assert 0 <= y["largest_loss"] - (1 - 0.05 ** (1 / 11)) <= 0.01
    early = found["threshold 0.01"]["groups"][0]
    assert early["loss"]["mean"] > 0.5 and early["largest_loss"] > x["largest_loss"]
    # The records that chose the thresholds say too little of them, but nothing wrong of other thresholds.
    path.write_text(json.dumps(certificate | {"data_sha256": file_sha256(tmp_path / "task.jsonl")}))
    assert evaluate(*options, "--json") == 0
    told = capsys.readouterr()
    assert f"{path}: was calibrated on --tasks" in told.err
    again = json.loads(told.out)["groups"]
    assert again["calibrated"]["certified"] is None and again["calibrated"]["groups"][0]["largest_loss"] is None
    assert again["threshold 0.01"]["groups"][0]["largest_loss"] == early["largest_loss"]
    path.write_text(json.dumps(certificate | {"policy": None}))
    assert evaluate(*options) == 2
    assert f"--calibration: {path} answers in full mode here: no threshold was safe" in capsys.readouterr().err
