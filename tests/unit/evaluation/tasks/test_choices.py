"""Likelihoods of choices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ee.checkpoint.journal import open_journal
from megatron_ee.evaluation.tasks.answers import Setting, entry_key
from megatron_ee.evaluation.tasks.choices import ChoiceScores, score_choices
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.policy import ThresholdPolicy

FULL = Setting("full")
LOW = Setting("low", "threshold", ThresholdPolicy(threshold=0.01))
NEVER = Setting("never", "threshold", ThresholdPolicy(threshold=2.0))
LINES = [
    {"prompt": "one", "choices": ["yes", "no no no"], "answer": 0, "id": "x"},
    {"prompt": "without", "id": "y", "task": "other"},
    {"prompt": "two", "choices": ["left", "right", "up"], "answer": 2, "id": "z"},
]


def test_likelihoods_are_those_of_transformers(engine: Engine, byte_model: Path, read: Callable) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.float32, attn_implementation="eager")
    records = read(*LINES)
    found = score_choices(engine, records, [FULL, NEVER, LOW, Setting("speculative", "speculative")], batch=4)
    assert {name: set(own) for name, own in found.items()} == {
        name: {"x", "z"} for name in ("full", "never", "low", "speculative")
    }
    for record in records:
        expected = []
        for before, own in record.choice_ids:
            with torch.no_grad():
                scores = model(torch.tensor([[*before, *own]])).logits[0].log_softmax(-1)
            places = range(len(before) - 1, len(before) + len(own) - 1)
            expected.append(sum(float(scores[place, token]) for place, token in zip(places, own, strict=True)))
        if expected:
            assert found["full"][record.id].log_likelihoods == pytest.approx(expected, abs=1e-3)
            assert found["never"][record.id] == found["full"][record.id] == found["speculative"][record.id]
            assert found["full"][record.id].mean_layers == (4.0,) * len(expected)
            low = found["low"][record.id]
            assert min(low.mean_layers) < 4 and low.log_likelihoods != pytest.approx(expected, abs=1e-3)


def test_scores_are_continued(engine: Engine, read: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, path, about = read(*LINES), tmp_path / "answers.jsonl", {"made_by": "test", "settings": {}}
    with open_journal(path, about, entry_key, resume=False, overwrite=False) as journal:
        journal.append(
            {"setting": "full", "id": "x", "choices": {"log_likelihoods": [-7.0, -8.0], "mean_layers": [4, 4]}}
        )
        found = score_choices(engine, records, [FULL], journal)
    assert found["full"]["x"] == ChoiceScores((-7.0, -8.0), (4, 4))
    with open_journal(path, about, entry_key, resume=True, overwrite=False) as journal:
        monkeypatch.setattr(engine, "submit", lambda request: pytest.fail("scored again"))
        assert score_choices(engine, records, [FULL], journal) == found


def test_the_right_choice_by_sum_and_per_character(read: Callable) -> None:
    [record] = read({"prompt": "a", "choices": ["ab", "abcdef", "x"], "answer": 1})
    scores = ChoiceScores((-4.0, -6.0, -5.0), (4.0, 4.0, 4.0))
    assert (scores.accuracy(record), scores.accuracy_per_character(record)) == (0.0, 1.0)
    assert ChoiceScores((-4.0, -4.0, -4.0), (4.0,) * 3).accuracy(record) == 0.0  # the first of equal ones
