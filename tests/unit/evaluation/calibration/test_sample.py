"""The sample of a calibration: its two parts, and what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from megatron_ee.config.validation import validated
from megatron_ee.data.indexed import open_corpus
from megatron_ee.data.prepare import prepare_corpus
from megatron_ee.errors import ConfigError, DataError
from megatron_ee.evaluation.calibration.run import full_quality
from megatron_ee.evaluation.calibration.sample import (
    ALL,
    CalibrationPlan,
    by_group,
    check_overlap,
    check_possible,
    check_records,
    scopes_of,
    split_sample,
)
from megatron_ee.evaluation.tasks.answers import TaskAnswer
from megatron_ee.evaluation.tasks.metrics import METRICS
from megatron_ee.evaluation.tasks.records import TaskRecord
from megatron_ee.inference.certificate import Metric

PLAN = CalibrationPlan(risk=0.1, delta=0.1)


def make_records(count: int, groups: tuple[str, ...] = (), **fields: Any) -> list[TaskRecord]:
    named = [{"group": groups[index % len(groups)]} if groups else {} for index in range(count)]
    return [
        TaskRecord(id=str(index), task="t", prompt=f"Question {index}?", **each, **fields)
        for index, each in enumerate(named)
    ]


def test_the_parts_are_disjoint_shuffled_and_the_seeds_own() -> None:
    records = make_records(50)
    fit, test = split_sample(records, PLAN)
    assert len(fit) == 10 and len(test) == 40
    assert {each.id for each in fit} | {each.id for each in test} == {each.id for each in records}
    assert split_sample(records, PLAN) == (fit, test)
    other = split_sample(records, PLAN.model_copy(update={"seed": 1}))
    assert other != (fit, test) and [each.id for each in test] != sorted((each.id for each in test), key=int)


def test_every_group_is_in_both_parts() -> None:
    records = make_records(60, ("a", "b", "c"))
    fit, test = split_sample(records, PLAN.model_copy(update={"per_group": "worst"}))
    assert {name: len(each) for name, each in by_group(fit).items()} == {"a": 4, "b": 4, "c": 4}
    assert {name: len(each) for name, each in by_group(test).items()} == {"a": 16, "b": 16, "c": 16}


def test_a_sample_that_is_too_small_is_told_how_many_lines_would_do() -> None:
    _, test = split_sample(make_records(20), PLAN)
    with pytest.raises(ConfigError, match=r"^risk: 0.1 with delta 0.1 needs 22 .* leave 16; give 28 lines, or"):
        check_possible(scopes_of(test, PLAN), PLAN)
    _, test = split_sample(make_records(28), PLAN)
    assert check_possible(scopes_of(test, PLAN), PLAN) == {ALL: 22}
    _, test = split_sample(make_records(27), PLAN)
    with pytest.raises(ConfigError):
        check_possible(scopes_of(test, PLAN), PLAN)


def test_a_small_group_is_named_or_stays_in_full_mode() -> None:
    records = make_records(40, ("large",)) + [
        TaskRecord(id=f"s{index}", task="t", prompt="?", group="tiny") for index in range(3)
    ]
    worst, own = (PLAN.model_copy(update={"per_group": name}) for name in ("worst", "own"))
    with pytest.raises(ConfigError, match=r"lines of group 'tiny' leave 2; give 28 lines of each group"):
        check_possible(scopes_of(split_sample(records, worst)[1], worst), worst)
    assert check_possible(scopes_of(split_sample(records, own)[1], own), own) == {"large": 29, "tiny": 29}
    small = own.model_copy(update={"risk": 0.01})
    with pytest.raises(ConfigError, match="of group 'tiny', 'large' leave 2"):
        check_possible(scopes_of(split_sample(records, small)[1], small), small)


def test_what_a_loss_or_the_groups_need_is_asked_of_every_line() -> None:
    check_records(make_records(3, references=("x",)), PLAN.model_copy(update={"loss": "quality"}))
    with pytest.raises(ConfigError, match="references: missing; --loss quality"):
        check_records(make_records(3), PLAN.model_copy(update={"loss": "quality"}))
    with pytest.raises(ConfigError, match="group: missing; --per-group"):
        check_records(make_records(3), PLAN.model_copy(update={"per_group": "own"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"risk": 0.0}, "risk: must be above 0, not 0.0"),
        ({"risk": 1.5}, "risk: must be below 1, not 1.5"),
        ({"delta": 1.0}, "delta: must be below 1, not 1.0"),
        ({"fit_share": 1.0}, "fit_share: must be below 1, not 1.0"),
        ({"metric": "bleu"}, "metric: must be one of 'contains', 'exact_match', 'f1' or 'rouge_l', not 'bleu'"),
        ({"measure": "doubt"}, "measure: must be one of probability, margin, entropy, not 'doubt'"),
        ({"policy": "gate", "measure": "margin"}, "measure: has no effect with policy gate"),
    ],
)
def test_a_plan_out_of_range_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validated(CalibrationPlan, {"risk": 0.1, "delta": 0.1, **fields})
    assert str(error.value).startswith(message)


def test_certificates_know_the_metrics() -> None:
    assert set(get_args(Metric)) == set(METRICS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, hf_dir: Path) -> Path:
    """Two texts; the first begins with a prompt of the sample."""
    root = tmp_path_factory.mktemp("corpus")
    texts = ["Question  3?\nAn answer.", "unrelated"]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_corpus([root / "texts.jsonl"], hf_dir, root / "train", workers=1)
    return root / "train"


def adapter_of(*corpora: tuple[str, str]) -> Any:
    return SimpleNamespace(corpora=corpora or None)


def test_prompts_that_the_exits_were_tuned_on_are_refused(corpus: Path) -> None:
    records = make_records(5)
    known = adapter_of((str(corpus), open_corpus(corpus).fingerprint))
    with pytest.raises(ConfigError, match=r"1 of its 5 prompts are in .*train, .*--allow-overlap"):
        check_overlap(records, known, [], allow=False)
    result, notices = check_overlap(records, known, [], allow=True)
    assert result == "allowed" and len(notices) == 1
    assert check_overlap(records[:3], known, [], allow=False) == ("none", [])
    with pytest.raises(ConfigError, match="allow-overlap"):
        check_overlap(records, adapter_of(), [corpus], allow=False)


def test_a_corpus_that_is_given_stands_for_itself_alone(corpus: Path, tmp_path: Path, hf_dir: Path) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "nothing of the sample"}) + "\n")
    prepare_corpus([tmp_path / "other.jsonl"], hf_dir, tmp_path / "other", workers=1)
    own, other = ((str(path), open_corpus(path).fingerprint) for path in (corpus, tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"prompts are in .*train"):
        check_overlap(make_records(5), adapter_of(own, ("moved", other[1])), [tmp_path / "other"], allow=False)
    unasked = make_records(3)
    moved = adapter_of(own, ("moved", other[1]))
    assert check_overlap(unasked, moved, [tmp_path / "other"], allow=False) == ("none", [])
    assert check_overlap(unasked, adapter_of(("gone", "0" * 64)), [corpus], allow=False)[0] == "unknown"


def test_it_is_said_where_the_corpus_is_not_known(corpus: Path, tmp_path: Path) -> None:
    records = make_records(5)
    for adapter in (adapter_of(), adapter_of(("gone", "0" * 64)), adapter_of((str(corpus), "0" * 64))):
        result, [notice] = check_overlap(records, adapter, [], allow=False)
        assert result == "unknown" and "is not known" in notice and "--corpus" in notice
    with pytest.raises(DataError, match="has no hashes of its texts"):
        check_overlap(records, adapter_of(), [tmp_path / "old"], allow=False)


def test_messages_count_by_the_users_last_one(corpus: Path, make_hf: Callable[..., Path]) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "question 3?"}]
    record = TaskRecord(id="0", task="t", messages=messages)
    with pytest.raises(ConfigError, match="allow-overlap"):
        check_overlap([record], adapter_of(), [corpus], allow=False)


def test_full_modes_own_score_is_stated_for_quality_alone() -> None:
    records = make_records(4, references=("yes",))
    full = {
        each.id: TaskAnswer(("Yes.", "No.")[index % 2], (), (), (), None, "stop", 0.0)
        for index, each in enumerate(records)
    }
    assert full_quality(records, PLAN, full) is None
    assert full_quality(records, PLAN.model_copy(update={"loss": "quality"}), full) == 0.5
