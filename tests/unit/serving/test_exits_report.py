"""``megatron-ee exits-report``: figures by task and day, tables, JSON and plots of logs as the server writes them."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.commands.main import main
from megatron_ee.evaluation.drift.audits import Audit
from megatron_ee.inference.requests import Coverage
from megatron_ee.serving.exit_log import ExitLog
from megatron_ee.serving.exit_record import ExitRecord, now_utc
from megatron_ee.serving.exits_report import exit_figures

DAY = 86_400
NOON = 1_764_504_000  # 2025-11-30T12:00:00Z
CERTIFIED = Coverage(status="certified", task="inquiries", certificate="c" * 64)


def record(number: int, day: int = 0, **changes: Any) -> ExitRecord:
    values: dict[str, Any] = {
        **{"number": number, "id": f"cmpl-{number}", "time": now_utc(NOON + day * DAY), "task": "inquiries"},
        **{"mode": "threshold", "finish_reason": "eos", "prompt_tokens": 12, "tokens": 5, "num_layers": 12},
        **{"tokens_by_layer": {"4": 4, "12": 1}, "confidences": (0,) * 9 + (5,), "layers_per_token": 6.0},
        **{"seconds": 0.5, "time_to_first_token": 0.1, "calibration": CERTIFIED},
    }
    return ExitRecord(**{**values, **changes})


def full(number: int, day: int = 0) -> ExitRecord:
    changes = {"mode": "full", "task": "contracts", "tokens_by_layer": {"12": 5}, "layers_per_token": 12.0}
    return record(number, day, **changes, calibration=None, tier="important", time_to_first_token=0.3)


def make_logs(directory: Path) -> list[Path]:
    """Three days with a rotation each; the oldest is compressed."""
    now = NOON
    log = ExitLog(directory / "exits.jsonl", clock=lambda: now)
    for day in range(3):
        now = NOON + day * DAY
        for number in range(day * 10, day * 10 + 6):
            log.write(record(number, day, audit=Audit(loss=0.5, certificate="c" * 64) if number % 2 else None))
        log.write(full(day * 10 + 6, day))
        if day == 2:
            log.write(record(29, day, status="cancelled", finish_reason="cancelled", tokens=0, tokens_by_layer={}))
    log.close()
    oldest, *rest = sorted(directory.glob("exits.2*"))
    packed = oldest.with_name(f"{oldest.name}.gz")
    packed.write_bytes(gzip.compress(oldest.read_bytes()))
    oldest.unlink()
    with (directory / "exits.jsonl").open("ab") as file:
        file.write(b'{"number": 30, "id":')  # a server that is writing
    return [directory / "exits.jsonl", packed, *rest]


def test_figures_by_task_and_day() -> None:
    figures = exit_figures([record(0), record(1, 1), full(2), full(3, 1), full(4, 1)])
    assert set(figures) == {
        (task, day) for task in ("inquiries", "contracts", None) for day in ("2025-11-30", "2025-12-01", None)
    }
    assert figures["contracts", "2025-12-01"].requests == 2
    total = figures[None, None]
    assert total.requests == 5 and total.tokens == 25
    assert total.by_layer == {4: 8, 12: 17} and total.early_share == 8 / 25
    assert total.layers_per_token == pytest.approx((2 * 4 * 6 + 3 * 4 * 12) / 20)
    cancelled = record(5, tokens=5, outputs=2, later_tokens=4)  # the second output has no token
    assert exit_figures([full(2), cancelled])[None, None].layers_per_token == 9.0  # of both 4 later tokens
    assert figures["contracts", None].to_dict()["early_share"] == 0
    assert exit_figures([record(0, num_layers=None)])[None, None].early_share is None


def test_the_json_holds_every_task_and_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = make_logs(tmp_path)
    assert main(["exits-report", *map(str, logs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["requests"] == 22 and found["total"]["audits"] == 9
    assert found["total"]["audit_mean_loss"] == 0.5
    assert list(found["tasks"]) == ["inquiries", "contracts"]
    rows = [(row["task"], row["day"], row["requests"]) for row in found["rows"]]
    days = ["2025-11-30", "2025-12-01", "2025-12-02"]
    assert rows == [
        *(("inquiries", day, 7 if day == days[2] else 6) for day in days),
        *(("contracts", day, 1) for day in days),
    ]
    assert found["rows"][2]["statuses"] == {"cancelled": 1, "ok": 6}
    assert found["tasks"]["contracts"]["time_to_first_token"]["p95"] == pytest.approx(0.3)
    assert found["tasks"]["inquiries"]["coverage"] == {"certified": 19}
    assert found["total"]["acceptance_rate"] is None


def test_the_tables_and_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs, plot = make_logs(tmp_path), tmp_path / "exits.svg"
    for _ in range(2):  # its own plot is replaced
        assert main(["exits-report", *map(str, logs), "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and plot.read_text().startswith("<?xml")
    lines = out.splitlines()
    [row] = {line for line in lines if line.startswith("contracts") and "2025-12-01" in line}
    assert row.split() == [
        *("contracts", "2025-12-01", "1", "0", "100%", "0%", "5", "12.0", "0%", "-", "0.3", "0.3", "0.5", "0", "-")
    ]
    assert any(line.split()[:3] == ["all", "all", "22"] for line in lines)
    assert any(line.split() == ["inquiries", "80.0%", "20.0%"] for line in lines)


def test_a_log_whose_only_request_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "exits.jsonl", tmp_path / "exits.png"
    failed = {"tokens": 0, "tokens_by_layer": {}, "layers_per_token": None, "time_to_first_token": None}
    path.write_text(record(0, status="error", **failed).model_dump_json() + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["exits-report", str(path), "--plot", str(plot)]) == 0
    assert capsys.readouterr().err == "" and plot.exists()


def test_an_empty_log_and_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, plot = tmp_path / "exits.jsonl", tmp_path / "exits.png"
    log.touch()
    assert main(["exits-report", str(log), "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    assert out == "The logs have no requests.\n" and f"so no {plot}" in err and not plot.exists()
    assert main(["exits-report", str(log), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == []
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"number": 1, "id": "a"}\n')
    named = tmp_path / "named.jsonl"
    named.write_text(json.dumps(record(0).model_dump() | {"tokens_by_layer": {"final": 3}}) + "\n")
    for arguments, status, message in (
        ([str(tmp_path / "none")], 2, "LOG: no such file or directory"),
        ([str(log), "--plot", "a.gif"], 2, "--plot: a.gif must end in one of .png, .pdf, .svg"),
        ([str(bad), "--plot", str(bad)], 2, "--plot: "),
        ([str(bad)], 1, f"{bad}:1: "),
        ([str(named)], 1, f"{named}:1: tokens_by_layer.final: "),
    ):
        assert main(["exits-report", *arguments]) == status
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"megatron-ee exits-report: error: {message}") and err.count("\n") == 1
