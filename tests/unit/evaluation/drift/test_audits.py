"""Audited requests: how they are drawn, and read back from exit logs."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.errors import DataError, UserError
from megatron_ee.evaluation.drift.audits import audited, certificates, read_audits


def record(number: int, loss: float | None = None, certificate: str | None = "a" * 8, **others: Any) -> str:
    audit = None if loss is None else {"loss": loss, "certificate": certificate}
    return json.dumps({"number": number, "id": f"request-{number}", "audit": audit, **others}) + "\n"


def test_the_draw_depends_on_number_and_seed_alone() -> None:
    drawn = {number for number in range(20_000) if audited(number, 1, 0.02)}
    assert 340 < len(drawn) < 460  # three standard deviations around 400
    assert drawn == {number for number in reversed(range(20_000)) if audited(number, 1, 0.02)}
    assert drawn < {number for number in range(20_000) if audited(number, 1, 0.1)}
    other = {number for number in range(20_000) if audited(number, 2, 0.02)}
    assert len(drawn & other) < 30
    assert not any(audited(number, 1, 0.0) for number in range(100))
    assert all(audited(number, 1, 1.0) for number in range(100))


def test_audits_come_in_the_order_of_admission(tmp_path: Path) -> None:
    first, second = tmp_path / "exits.1.jsonl", tmp_path / "exits.jsonl"
    first.write_text(record(5, 0.5, time="2026-01-01") + "\n" + record(2, 0.25) + record(3))
    second.write_text(record(1, 1, certificate=None) + record(9, 0.0, "b" * 8) + record(10, 1.0)[:-1])
    found = read_audits([second, first])
    assert [each.number for each in found] == [1, 2, 5, 9]
    assert [each.audit.loss for each in found if each.audit] == [1.0, 0.25, 0.5, 0.0]
    assert certificates(found) == ["a" * 8, "b" * 8]


def test_requests_that_were_not_audited_take_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "exits.jsonl"
    path.write_text(record(50_000, 0.5) + "".join(record(number) for number in range(50_000)))
    tracemalloc.start()
    try:
        [found] = read_audits([path])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.number == 50_000 and peak < 4 * 2**20
    path.write_text("")
    assert read_audits([path]) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (record(1, 1.5), "audit.loss: must be at most 1, not 1.5"),
        (record(1, -0.5), "audit.loss: must be at least 0, not -0.5"),
        (record(-1, 0.5), "number: must be at least 0, not -1"),
        ('{"id": "a"}\n', "number: missing"),
        ("[1]\n", "must be an object, not [1]"),
        ("{\n", "not valid JSON"),
        (record(0), "number 0 is in"),
        (record(2**63, 0.5), "number: must be below 9223372036854775808"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "exits.jsonl"
    path.write_text(record(0) + line)
    with pytest.raises(UserError) as error:
        read_audits([path])
    assert str(error.value).startswith(f"{path}:2: {message}")
    with pytest.raises(DataError, match="cannot be read"):
        read_audits([tmp_path])
