"""Answers of the engine to records, in several settings, and how they are continued after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ee.checkpoint.journal import Journal, open_journal
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.evaluation.tasks.answers import Setting, TaskAnswers, answer_records, entry_key
from megatron_ee.evaluation.tasks.records import TaskRecord
from megatron_ee.evaluation.tasks.run import compared_settings
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.policy import ThresholdPolicy

SETTINGS = [
    Setting("full", max_tokens=8),
    Setting("speculative", "speculative", max_tokens=8),
    Setting("low", "threshold", ThresholdPolicy(threshold=0.01), max_tokens=8),
    Setting("never", "threshold", ThresholdPolicy(threshold=2.0), exits=(1,), max_tokens=8),
]
ABOUT = {"made_by": "test", "settings": {}}


@pytest.fixture
def records(read: Callable) -> list[TaskRecord]:
    return read(*({"prompt": f"say {n}", "id": f"{n}", "task": "a" if n < 6 else "b"} for n in range(9)))


def test_thresholds_that_differ_have_different_names() -> None:
    """Answers are kept by the setting's name."""
    spec = SimpleNamespace(layer=2, gate=False)
    released: Any = SimpleNamespace(model=SimpleNamespace(architecture=SimpleNamespace(num_layers=4)), exits=[spec])
    names = [each.name for each in compared_settings(released, [0.8, 0.9999996, 0.9999999, 1])]
    assert names == [
        "full",
        "speculative",
        "threshold 0.8",
        "threshold 0.9999996",
        "threshold 0.9999999",
        "threshold 1",
    ]


def outputs(found: TaskAnswers) -> dict[str, dict[str, Any]]:
    """What does not depend on measured time, as the drafts of speculative mode do."""
    return {
        name: {id_: (each.text, each.token_ids, name == "speculative" or each.layers) for id_, each in own.items()}
        for name, own in found.by_setting.items()
    }


def test_answers_are_the_engines(engine: Engine, records: list[TaskRecord]) -> None:
    found = answer_records(engine, records, SETTINGS, batch=4)
    for setting in SETTINGS:
        for record in records:
            answer = found.by_setting[setting.name][record.id]
            [[completion]] = engine.generate([setting.request(record.prompt_ids)])
            assert answer.text == completion.text
            assert answer.token_ids == tuple(token.id for token in completion.tokens)
            assert answer.finish_reason == completion.finish_reason
            assert len(answer.layers) == len(answer.confidences) == len(answer.token_ids) and answer.seconds > 0
            if setting.mode != "speculative":
                assert answer.layers == tuple(token.layer for token in completion.tokens)
                assert answer.layers_per_token == completion.statistics["layers_per_token"]
    full, never, low = (found.by_setting[name] for name in ("full", "never", "low"))
    assert [each.token_ids for each in full.values()] == [each.token_ids for each in never.values()]
    assert any(set(each.layers) != {4} for each in low.values())


def test_blocks_are_runs_of_one_task_that_every_setting_answered(engine: Engine, records: list[TaskRecord]) -> None:
    found = answer_records(engine, records, SETTINGS[:2], batch=1)
    assert [(block.task, block.rows) for block in found.blocks] == [("a", 3), ("a", 3), ("b", 3)]  # not 4 and 2
    for block in found.blocks:
        assert set(block.seconds) == {"full", "speculative"} and min(block.seconds.values()) > 0
    for name, own in found.by_setting.items():
        assert sum(block.tokens[name] for block in found.blocks) == sum(len(each.token_ids) for each in own.values())


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("count", [9, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 24))])
def test_an_interrupted_run_is_continued(
    count: int, engine: Engine, records: list[TaskRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answer_records(engine, records, SETTINGS, batch=2)
    path = tmp_path / "answers.jsonl"
    append = Journal.append

    def limited(journal: Journal, entry: Any) -> None:
        if len(journal.places) == count:
            raise Killed
        append(journal, entry)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "append", limited)
        with open_journal(path, ABOUT, entry_key, resume=True, overwrite=False) as journal:
            answer_records(engine, records, SETTINGS, journal, batch=2)
    for number in list(engine._outputs):  # the process would have ended
        engine.cancel(engine._outputs[number].seq.params.request)
    engine._events.clear()
    path.write_bytes(path.read_bytes() + b'{"setting": "fu')
    kept = len(path.read_text().splitlines()) - 1
    with open_journal(path, ABOUT, entry_key, resume=True, overwrite=False) as journal:
        assert len(journal.places) == kept == count
        found = answer_records(engine, records, SETTINGS, journal, batch=2)
    assert outputs(found) == outputs(whole)
    assert len(found.blocks) == len(whole.blocks) - 1 == 1  # the interrupted one is not timed
    with open_journal(path, ABOUT, entry_key, resume=True, overwrite=False) as journal:
        monkeypatch.setattr(engine, "submit", lambda request: pytest.fail("answered again"))
        again = answer_records(engine, records, SETTINGS, journal, batch=2)
    assert again == found


def test_a_foreign_entry_of_a_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with open_journal(path, ABOUT, entry_key, resume=False, overwrite=False) as journal:
        journal.append({"setting": "full", "id": "x", "answer": {}})
    for line in ({"id": "x"}, {"setting": "full", "id": "x", "answer": {}}, [], {"answer": 1, "block": 1}):
        before = path.read_bytes()
        path.write_bytes(before + json.dumps(line).encode() + b"\n")
        with (
            pytest.raises(CheckpointError, match=r"answers.jsonl, line 2: does not answer"),
            open_journal(path, ABOUT, entry_key, resume=True, overwrite=False),
        ):
            pass
        path.write_bytes(before)


def test_a_record_that_does_not_fit_is_named(engine: Engine, read: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    [record] = read({"prompt": "a"})
    budget: Any = engine._scheduler.kv_caches.budget
    monkeypatch.setattr(budget, "total", 10)
    with pytest.raises(ConfigError, match=r"task.jsonl:1: max_tokens: .* positions need"):
        answer_records(engine, [record], SETTINGS)


def test_a_setting_has_a_json_form() -> None:
    forms = json.loads(json.dumps([setting.to_dict() for setting in SETTINGS]))
    assert forms[0] == {"name": "full", "mode": "full", "policy": None, "exits": None, "max_tokens": 8, "stop": []}
    assert forms[3]["exits"] == [1] and forms[3]["policy"]["threshold"] == 2.0
