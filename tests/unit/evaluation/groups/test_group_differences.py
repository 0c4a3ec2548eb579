"""Groups of records: tests with known answers, how often they are wrong, and what is said of small groups."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_ee.evaluation.groups import compare as compare_module
from megatron_ee.evaluation.groups import tasks
from megatron_ee.evaluation.groups.compare import (
    AGREEMENT,
    LAYERS,
    LOSS,
    QUALITY,
    EarlyResults,
    GroupComparison,
    compare_groups,
)
from megatron_ee.evaluation.groups.report import groups_dict, plot_groups, print_groups, warning
from megatron_ee.evaluation.statistics import holm, permutation_p, wilson
from megatron_ee.evaluation.tasks.results import BASELINE

SIZES = {"a": 80, "b": 50, "c": 20, "d": 10}
NAMES = [name for name, size in SIZES.items() for _ in range(size)]
COUNT = len(NAMES)
Values = NDArray[np.float64]


def results(losses: Values) -> EarlyResults:
    """Records that differ in nothing but their losses."""
    return EarlyResults(np.full(len(losses), 20.0), np.ones(len(losses)), losses=losses)


def compare(found: EarlyResults, names: Sequence[str], by: str, **options: int) -> GroupComparison:
    """Of one setting."""
    return compare_groups({"one": found}, names, by, **options)["one"]


def rare(rng: np.random.Generator) -> Values:
    return (rng.random(COUNT) < 0.1).astype(float)


def skewed(rng: np.random.Generator) -> Values:
    return rng.beta(0.3, 2.7, COUNT)


def wider_in_a_small_group(rng: np.random.Generator) -> Values:
    """Equal means; a test of the plain difference of means would call group c different in a third of the cases."""
    width = np.where(np.array(NAMES) == "c", 0.4, 0.05)
    return 0.5 + width * (2 * rng.random(COUNT) - 1)


@pytest.mark.parametrize(
    "make", [*(pytest.param(each, marks=pytest.mark.slow) for each in (rare, skewed)), wider_in_a_small_group]
)
def test_without_a_difference_warnings_are_rare(make: Callable[[np.random.Generator], Values]) -> None:
    rng, trials, found = np.random.default_rng(0), 200, 0
    inside = [np.array(NAMES) == name for name in SIZES]
    for _ in range(trials):
        values = make(rng)
        found += min(holm([permutation_p(values[each], values[~each], rng, 199) for each in inside])) <= 0.05
    assert found <= 0.05 * trials + 3 * math.sqrt(0.05 * 0.95 * trials)


def test_a_planted_difference_is_found_and_no_other() -> None:
    rng, found = np.random.default_rng(1), []
    for seed in range(20):
        losses = (rng.random(COUNT) < np.where(np.array(NAMES) == "b", 0.4, 0.05)).astype(float)
        compared = compare(results(losses), NAMES, "group", seed=seed, permutations=499)
        found.append([group.name for group in compared.riskier])
    assert found.count(["b"]) >= 18
    none = [compare(results(rare(rng)), NAMES, "group", seed=seed, permutations=199) for seed in range(60)]
    assert sum(bool(each.riskier) for each in none) <= 0.05 * 60 + 3 * math.sqrt(0.05 * 0.95 * 60)


def test_p_values_are_corrected_for_groups_and_settings_together() -> None:
    rng = np.random.default_rng(4)
    settings = {name: results(skewed(rng)) for name in ("one", "other")}
    together = compare_groups(settings, NAMES, "group", permutations=99)
    raw = [
        permutation_p(each.losses[inside], each.losses[~inside], own, 99)  # type: ignore[index]
        for each in settings.values()
        for own in [np.random.default_rng(0)]
        for inside in (np.array(NAMES) == name for name in SIZES)
    ]
    found = [group.figures[LOSS].p for each in together.values() for group in each.groups]
    assert found == holm(raw) and found != [*holm(raw[:4]), *holm(raw[4:])]


@pytest.mark.slow
def test_without_a_difference_marks_are_rare_in_four_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrected for the groups of each setting alone, one of four independent settings has a mark in 15% of cases."""
    rng, trials = np.random.default_rng(5), 200
    settings = [SimpleNamespace(name=name, mode="threshold") for name in "wxyz"]
    rows = [SimpleNamespace(record=SimpleNamespace(group=name)) for name in NAMES]
    given: Any = SimpleNamespace(settings=settings, rows=dict.fromkeys([BASELINE, *"wxyz"], rows))
    monkeypatch.setattr(tasks, "early_results", lambda *_: results(skewed(rng)))
    monkeypatch.setattr(tasks, "compare_groups", partial(compare_groups, permutations=499))
    monkeypatch.setattr(compare_module, "_interval", lambda *_: (0.0, 0.0))  # slow, and not what is asked
    marks = 0
    for _ in range(trials):
        compared = tasks.compare_task_groups(given, "group")
        p_values = [group.figures[LOSS].p for found in compared.values() for group in found.groups]
        marks += min(p for p in p_values if p is not None) <= 0.05
    assert marks <= 0.05 * trials + 3 * math.sqrt(0.05 * 0.95 * trials)


def measured() -> EarlyResults:
    rng = np.random.default_rng(2)
    full = (rng.random(COUNT) < 0.6).astype(float)
    early = np.where((np.array(NAMES) == "b") & (rng.random(COUNT) < 0.6), 0.0, full)
    early[5] = full[5] = np.nan  # a record without references
    return EarlyResults(20 + 5 * rng.random(COUNT), rng.beta(9, 1, COUNT), early, full)


def test_figures_of_groups() -> None:
    found = measured()
    compared = compare(found, NAMES, "script", permutations=999)
    assert [group.name for group in compared.groups] == ["a", "b", "c", "d"] and compared.risk == QUALITY
    assert [group.members for group in compared.groups] == [80, 50, 20, 10]
    a, b, *_ = compared.groups
    assert a.figures[QUALITY].members == 79 and a.figures[QUALITY].mean == 0
    assert -0.1 < a.figures[QUALITY].low < 0 < a.figures[QUALITY].high < 0.1  # no record differs, but few were seen
    figure = b.figures[QUALITY]
    assert figure.mean == np.mean((found.early_quality - found.full_quality)[80:130])  # type: ignore[operator]
    assert figure.low < figure.mean < figure.high < 0 and figure.worse and figure.p is not None and figure.p <= 0.01
    assert figure.rest == 0.0
    layers = a.figures[LAYERS]
    assert layers.mean == pytest.approx(found.layers[:80].mean()) and 20 < layers.low < layers.mean < layers.high < 25
    assert compared.overall[AGREEMENT] == pytest.approx(found.agreement.mean())
    assert compared == compare(found, NAMES, "script", permutations=999)
    by_loss = compare(results(np.zeros(COUNT)), NAMES, "script", permutations=99)
    assert by_loss.risk == LOSS and by_loss.groups[3].figures[LOSS].high == pytest.approx(wilson(0, 10)[1])
    assert not by_loss.riskier and warning(by_loss) is None


def test_small_groups_are_named_and_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["65-128"] * 20 + ["1-32"] * 20 + ["33-64"] * 9
    losses = np.array([0.0] * 40 + [1.0] * 9)
    compared = compare(results(losses), names, "length", permutations=99)
    assert [(group.name, group.too_small) for group in compared.groups] == [
        ("1-32", False),
        ("33-64", True),
        ("65-128", False),
    ]
    assert compared.groups[1].figures == {} and not compared.riskier
    print_groups({"threshold 0.8": compared})
    assert "Too small to be judged, fewer than 10 records: 33-64 (9)" in capsys.readouterr().out
    none = compare(results(losses), [str(place) for place in range(49)], "length", permutations=99)
    print_groups({"threshold 0.8": none})
    out = capsys.readouterr().out
    assert out.startswith("Groups by length: none has 10 records or more, so none is compared: 0 (1), 1 (1), ")
    assert out.count("\n") == 1
    # Where nothing is left to compare with, there is an interval and no test.
    (alone,) = compare(results(losses), ["all"] * 49, "group").groups
    assert alone.figures[LOSS].p is None and alone.figures[LOSS].rest is None and not alone.figures[LOSS].worse
    few, many = compare(results(losses[:45]), [*["few"] * 5, *["many"] * 40], "group").groups
    assert few.too_small and many.figures[LOSS].rest == 0 and many.figures[LOSS].p is None
    with pytest.raises(ValueError, match="49 records have 3 measures and 0 groups"):
        compare(results(losses), [], "group")


def test_what_is_said_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared = compare(measured(), NAMES, "script")
    line = warning(compared)
    assert line is not None and line.startswith("more risk than in the other groups by script: b (quality")
    assert "\n" not in line and "others 0.0%, p = 0.0004" in line
    print_groups({"threshold 0.8": compared})
    out = capsys.readouterr().out
    assert f"\nwarning: threshold 0.8: {line}\n" in out and "]!" in out and "Too small" not in out
    assert json.loads(json.dumps(groups_dict(compared)))["groups"][1]["quality difference"]["worse"] is True
    strange = compare(measured(), [f"{name}\u202e" for name in NAMES], "group", permutations=99)
    line = warning(strange)
    assert line is not None and r"b\u202e" in line and "\u202e" not in line
    plot_groups({"one": compared, "other": compared}, tmp_path / "groups.svg")
    assert "d (10)" in (tmp_path / "groups.svg").read_text()
