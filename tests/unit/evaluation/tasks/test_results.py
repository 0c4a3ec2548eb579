"""Figures of settings from answers made by hand, as tables and plots."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ee.evaluation.tasks import report
from megatron_ee.evaluation.tasks.answers import Setting, TaskAnswer, TimedBlock
from megatron_ee.evaluation.tasks.choices import ChoiceScores
from megatron_ee.evaluation.tasks.report import plot_tasks, print_tasks
from megatron_ee.evaluation.tasks.results import QUALITY, TaskResults, make_results, score_rows
from megatron_ee.inference.policy import ThresholdPolicy

SETTINGS = [
    Setting("full"),
    Setting("speculative", "speculative"),
    Setting("threshold 0.5", "threshold", ThresholdPolicy(threshold=0.5)),
]
NAMES = [setting.name for setting in SETTINGS]
BLOCKS = [
    TimedBlock("x", 2, dict(zip(NAMES, (2.0, 1.0, 1.0), strict=True)), dict.fromkeys(NAMES, 8)),
    TimedBlock("y", 1, dict(zip(NAMES, (2.0, 2.0, 1.0), strict=True)), dict.fromkeys(NAMES, 4)),
]


def answer(text: str, ids: list[int], layers_per_token: float, reason: str = "eos") -> TaskAnswer:
    count = len(ids)
    return TaskAnswer(text, tuple(ids), (4,) * count, (0.5,) * count, layers_per_token, reason, 0.1)


@pytest.fixture
def results(read: Callable) -> TaskResults:
    records = read(
        {"prompt": "a", "references": ["Paris"], "task": "x", "id": "0", "group": "g"},
        {"prompt": "b", "references": ["Rome", "Roma"], "task": "x", "id": "1"},
        {"prompt": "c", "references": ["東京"], "task": "y", "id": "2"},
        {"prompt": "d", "choices": ["l", "r"], "answer": 1, "task": "z", "id": "3"},
    )
    full = {
        "0": answer("It is Paris.", [1, 2, 3, 4], 4.0),
        "1": answer("Roma", [5, 6], 4.0),
        "2": answer("東京です", [7, 8, 9], 4.0, "length"),
    }
    early = {**full, "0": answer("It is London", [1, 2, 9, 4, 5], 2.0), "1": answer("Roma", [5, 6], 3.0)}
    answers = {"full": full, "speculative": full, "threshold 0.5": early}
    right, wrong = ChoiceScores((-2.0, -1.0), (4.0, 4.0)), ChoiceScores((-1.0, -2.0), (2.0, 2.0))
    choices = {"full": {"3": right}, "speculative": {"3": right}, "threshold 0.5": {"3": wrong}}
    return make_results(SETTINGS, score_rows(records, answers, choices), BLOCKS)


def test_means_and_differences_are_over_the_rows_that_have_a_score(results: TaskResults) -> None:
    full, speculative, early = results.overall
    assert {name: (each.rows, each.mean) for name, each in full.scores.items()} == {
        "contains": (3, 1.0),
        "exact_match": (3, pytest.approx(1 / 3)),
        "f1": (3, pytest.approx((2 / 4 + 1 + 4 / 6) / 3)),
        "rouge_l": (3, pytest.approx((2 / 4 + 1 + 4 / 6) / 3)),
        "accuracy": (1, 1.0),
        "accuracy_per_character": (1, 1.0),
        "equal_answers": (3, 1.0),
        "tokens_before_departure": (3, 1.0),
        "equal_tokens": (3, 1.0),
    }
    assert speculative.scores == full.scores
    contains = early.scores["contains"]
    assert (contains.mean, contains.difference) == (pytest.approx(2 / 3), pytest.approx(-1 / 3))
    assert -1 <= contains.low < contains.difference < contains.high == 0
    assert early.scores["accuracy"].mean == 0.0
    assert early.scores["equal_answers"].mean == pytest.approx(2 / 3)
    assert early.scores["tokens_before_departure"].mean == pytest.approx((2 / 5 + 2) / 3)
    assert early.scores["equal_tokens"].mean == pytest.approx((3 / 5 + 2) / 3)
    assert (full.mean_departure, early.mean_departure) == (None, 2.0)


def test_layers_lengths_and_speed(results: TaskResults) -> None:
    full, _, early = results.overall
    assert full.layers_per_token == 4.0 and early.layers_per_token == pytest.approx((4 * 2 + 1 * 3 + 2 * 4) / 7)
    assert full.exit_layer == 4.0
    assert (full.tokens, full.cut) == (3.0, pytest.approx(1 / 3))
    assert full.speed is not None and early.speed is not None
    assert (full.speed.rows, full.speed.tokens_per_second, full.speed.speedup) == (3, 3.0, 1.0)
    assert (early.speed.tokens_per_second, early.speed.speedup) == (6.0, 2.0)
    by_task = {task: found[2] for task, found in results.tasks.items()}
    assert by_task["x"].speed is not None and by_task["x"].speed.speedup == 2.0
    assert by_task["x"].scores["contains"].mean == 0.5 and by_task["y"].scores["contains"].mean == 1.0
    assert set(by_task["z"].scores) == {"accuracy", "accuracy_per_character"}
    z = by_task["z"]
    assert (z.speed, z.exit_layer, z.layers_per_token, z.tokens, z.cut) == (None,) * 5


def test_json_forms(results: TaskResults) -> None:
    found = json.loads(json.dumps({**results.to_dict(), "rows": results.rows_dict(), "timing": results.timing(16)}))
    assert list(found["overall"]) == ["full", "speculative", "threshold 0.5"]
    assert found["tasks"]["x"]["threshold 0.5"]["scores"]["contains"]["difference"] == -0.5
    assert found["timing"]["rows"] == 3 and found["timing"]["max_num_seqs"] == 16
    first, *_, last = found["rows"]
    assert (first["id"], first["task"], first["group"]) == ("0", "x", "g")
    assert first["settings"]["threshold 0.5"]["departure"] == 2 and first["settings"]["full"]["departure"] is None
    assert last["settings"]["threshold 0.5"] == {"accuracy": 0.0, "accuracy_per_character": 0.0}


def test_the_tables_hold_every_setting_and_say_how_speed_was_measured(results: TaskResults) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=160, markup=False, highlight=False)
    print_tasks(results, 16, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Quality beside speed (4 records of 3 tasks)" in text and "z (1 record)" in text
    line = next(line for line in text.splitlines() if line.lstrip().startswith("threshold 0.5"))
    assert "6.0" in line and "2.00x" in line and "66.7%" in line
    assert "3 of 3 answered records" in text and "at most 16 sequences at a time" in text
    assert "33.3% of full mode's answers were cut at 64 tokens" in text
    assert max(len(line) for line in text.splitlines() if "Speed:" not in line and "Second" not in line) <= 160


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_a_terminal(width: int, results: TaskResults) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_tasks(results, 16, console)
    text = console.file.getvalue().partition("Second lines")[0]  # type: ignore[attr-defined]
    assert "\u2026" not in text and max(map(len, text.splitlines())) <= width
    overall = text.partition("x (2 records)")[0]
    names = ("tokens/s", "speed", "exit layer", "layers per token", *report.NAMES.values(), "first departure")
    assert set(" ".join(names).split()) - set(overall.split()) <= {"before"}  # tokens before departure is not shown
    for each in results.overall[1:]:
        for score in (*QUALITY, *report.SHOWN_AGREEMENT):
            if score in each.scores:
                assert set(report._score(each, score=score).split("\n")) <= set(re.split(r"\s\s+|\n", overall))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_plot_shows_scores_and_settings(suffix: str, results: TaskResults, tmp_path: Path) -> None:
    path = tmp_path / f"tasks{suffix}"
    plot_tasks(results, path)
    assert path.stat().st_size > 5000
    plot_tasks(make_results(SETTINGS[:1], {"full": results.rows["full"]}, []), path)  # one setting, no time
