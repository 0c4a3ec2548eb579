"""Groups of the records of tasks, as ``evaluate --tasks --by`` shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.commands.main import main
from megatron_ee.evaluation.tasks.by_group import NO_GROUP, group_name
from megatron_ee.evaluation.tasks.records import TaskRecord


def test_groups_of_records(read: Callable) -> None:
    japanese = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "首都はどこ"}]
    short, long = read({"prompt": "say a", "group": "g"}, {"prompt": "long " * 8})
    conversation = TaskRecord(id="a", task="t", messages=japanese)
    assert [group_name(each, "group") for each in (short, long)] == ["g", NO_GROUP]
    assert [group_name(each, "script") for each in (short, conversation)] == ["Latin", "Japanese"]
    assert [group_name(each, "length") for each in (short, long)] == ["1-32", "33-64"]  # a token per byte


def test_groups_are_compared_in_threshold_mode(
    byte_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": f"{word} {number}", "references": ["a"], "group": group}
        for word, group, count in (("say", "x", 12), ("tell", "y", 11), ("ask", "z", 2))
        for number in range(count)
    ]
    path, output = tmp_path / "task.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["evaluate", "--model", byte_model, "--tasks", path, "--dtype", "float32", "--max-tokens", 3]
    exits = ["--adapter", adapter, "--thresholds", 2, "--by", "group"]
    assert main([*map(str, (*given, *exits, "--json", "--output", output))]) == 0
    found = json.loads(capsys.readouterr().out)["groups"]
    assert list(found) == ["threshold 2"] and found["threshold 2"]["risk"] == "quality difference"
    x, y, z = found["threshold 2"]["groups"]
    assert [each["members"] for each in (x, y, z)] == [12, 11, 2] and z["too_small"] and "agreement" not in z
    assert x["agreement"]["mean"] == 1 == y["agreement"]["p"] and x["exit layer"]["mean"] == 4
    assert found["threshold 2"]["warning"] is None and (output / "groups.png").is_file()
    # Shown again from the same answers, by something else.
    again = [*given, *exits[:-1], "length", "--output", output, "--resume"]
    assert main([*map(str, again)]) == 0
    assert "Groups by tokens of the prompt, threshold 2" in capsys.readouterr().out
    assert main([*map(str, (*given, "--by", "group"))]) == 2
    assert "--by: there are no exits" in capsys.readouterr().err
