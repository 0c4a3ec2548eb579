"""Tables: whatever the width of the terminal, no column is dropped and no cell is cut."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_ee.evaluation.groups import report as groups_report
from megatron_ee.evaluation.groups.compare import EarlyResults, compare_groups
from megatron_ee.serving import exits_report
from megatron_ee.serving.exit_record import ExitRecord
from megatron_ee.tables import add_columns, make_console, new_table


def terminal(width: int) -> Console:
    options: dict[str, Any] = {"force_terminal": True, "color_system": None, "markup": False, "highlight": False}
    return Console(file=io.StringIO(), width=width, **options)


def printed(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def check(text: str, width: int, headings: str, cells: list[str]) -> None:
    assert "\u2026" not in text
    words = text.split()
    assert set(headings.split()) <= set(words)
    assert all(cell in text for cell in cells)
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_table_that_is_too_wide_is_printed_in_parts(width: int) -> None:
    console = terminal(width)
    table = new_table("Title", console)
    add_columns(table, "setting", words=True)
    names = [f"measure {number} of many" for number in range(12)]
    add_columns(table, *names)
    for setting in ("full", "threshold 0.8"):
        table.add_row(setting, *(f"{number}.5% [{number}.0%, {number}.9%]" for number in range(12)))
    console.print(table)
    text = printed(console)
    check(text, width, " ".join(names), [f"{number}.5% [{number}.0%, {number}.9%]" for number in range(12)])
    rows = [line for line in text.splitlines() if "threshold 0.8" in line]
    assert len(rows) == text.count("setting") == text.count("full") > 1, "each part names the rows"
    assert text.count("Title") == 1


def test_words_break_where_numbers_do_not() -> None:
    console = terminal(40)
    table = new_table("", console)
    add_columns(table, "state", "found", words=True)
    add_columns(table, "size")
    table.add_row("good", "/a/path/that/is/longer/than/the/whole/terminal/is/wide", "1,234,567,890")
    console.print(table)
    text = printed(console)
    assert "1,234,567,890" in text and "\u2026" not in text
    assert "/a/path/that/is/longer/than/the/whole/terminal/is/wide" in "".join(
        line.removeprefix(" good ").replace("1,234,567,890", "").strip() for line in text.splitlines()[3:]
    )


def test_names_are_shown_as_they_are_on_one_line() -> None:
    console = terminal(80)
    table = new_table("", console)
    add_columns(table, "group", words=True)
    add_columns(table, "records")
    table.add_row("a\x1b[31m\u202e", "1\n2")
    console.print(table)
    assert r"a\x1b[31m\u202e" in printed(console) and "\x1b" not in printed(console)
    file = io.StringIO()
    make_console(file).print("task:key:[red]")
    assert file.getvalue() == "task:key:[red]\n"


@pytest.mark.parametrize("width", [80, 120])
def test_the_exits_report_fits_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(width)
    monkeypatch.setattr(exits_report, "make_console", lambda: console)
    records = [
        ExitRecord(
            **{"number": number, "id": str(number), "time": f"2026-11-{day}T09:00:00Z", "task": task, "mode": "full"},
            **{"prompt_tokens": 1, "tokens": 1234, "tokens_by_layer": {"32": 1234}, "num_layers": 32, "seconds": 1.25},
        )
        for number, (task, day) in enumerate([("contracts", 10), ("contracts", 11), ("inquiries", 10)])
    ]
    exits_report.print_exits(exits_report.exit_figures(records))
    headings = "task day requests not ok full mode certified tokens layers per token early accepted first token p50 s"
    check(printed(console), width, f"{headings} p95 s answer audits mean loss", ["contracts", "2026-11-10", "1.25"])


@pytest.mark.parametrize("width", [80, 120])
def test_the_comparison_of_groups_fits_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(width)
    monkeypatch.setattr(groups_report, "make_console", lambda: console)
    rng, count = np.random.default_rng(0), 60
    quality = rng.random(count).round()
    results = EarlyResults(20 + 5 * rng.random(count), rng.beta(9, 1, count), quality, quality, rng.random(count))
    names = ["Latin"] * 30 + ["Japanese"] * 30
    compared = compare_groups({"threshold 0.8": results}, names, "script", permutations=19)
    groups_report.print_groups(compared)
    table = printed(console).partition("Means with")[0]
    cells = [
        groups_report._cell(figure, measure).strip()
        for group in compared["threshold 0.8"].groups
        for measure, figure in group.figures.items()
    ]
    assert len(cells) == 8
    check(table, width, "group records exit layer agreement quality difference loss p,", ["Japanese", *cells])
