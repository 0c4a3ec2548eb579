"""``megatron-ee drift``: what it prints of a log with and without drift."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.commands.main import main

CERTIFICATE = {
    **{"made_by": "megatron-ee calibrate", "version": 1, "task": "words", "loss": "disagreement"},
    **{"risk": 0.05, "delta": 0.1, "p_value": "betting", "n": 80, "n_fit": 20, "policy": None, "full_layers": 4},
    **{f"{name}_sha256": "0" * 64 for name in ("model", "adapter", "tokenizer", "data")},
    "decoding": {
        **{"chat": True, "max_tokens": 8, "sampling": {}, "dtype": "float32", "weights": "packed", "quantise": "none"}
    },
    **{"overlap": "none", "seed": 0, "date": "2026-01-01T00:00:00+00:00"},
}


def write_log(path: Path, losses: list[float], certificates: tuple[str | None, ...] = ("c",)) -> Path:
    """Every second request is audited."""
    lines = []
    for number, loss in enumerate(losses):
        audit = {"loss": loss, "certificate": certificates[number % len(certificates)]}
        lines += [{"number": 2 * number, "id": f"r{2 * number}", "audit": audit}]
        lines += [{"number": 2 * number + 1, "id": f"r{2 * number + 1}", "audit": None}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_log_without_drift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "exits.jsonl", [0.0] * 50)
    assert main(["drift", str(log), "--risk", "0.1"]) == 0
    out, err = capsys.readouterr()
    assert "No alarm: nothing in 50 audited requests" in out and err == ""


def test_a_log_with_drift_gives_the_audit_and_the_request_of_each_alarm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_log(tmp_path / "exits.jsonl", [0.0] * 50 + [1.0] * 25)
    plot = tmp_path / "drift.svg"
    assert main(["drift", str(log), "--risk", "0.1", "--json", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["audits"] == 75 and found["uncounted"] == 0 and found["mean_loss"] == pytest.approx(1 / 3)
    first = found["restarting"]["alarms"][0]
    assert 51 <= first["audit"] <= 55 and first["number"] == 2 * (first["audit"] - 1)
    assert first["id"] == f"r{first['number']}"
    assert found["from_start"]["alarm"]["audit"] >= first["audit"] and found["from_start"]["p_value"] <= 0.01
    assert "audited requests" in plot.read_text()
    assert main(["drift", str(log), "--risk", "0.1", "--plot", str(plot)]) == 0  # its own plot is replaced
    assert "ALARM: the mean loss seems to be above the risk of 0.1: the test from the start" in capsys.readouterr().out


def test_a_certificate_of_quality_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, certificate = write_log(tmp_path / "exits.jsonl", [0.0]), tmp_path / "c.json"
    certificate.write_text(json.dumps({**CERTIFICATE, "loss": "quality", "metric": "f1"}))
    assert main(["drift", str(log), "--calibration", str(certificate)]) == 2
    assert "never audited; calibrate with --loss disagreement or rouge" in capsys.readouterr().err


def test_only_requests_under_the_certificate_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "exits.jsonl", [0.0, 1.0] * 20, ("c", None))
    assert main(["drift", str(log), "--risk", "0.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["audits"] == found["uncounted"] == 20 and found["mean_loss"] == 0
    two = write_log(tmp_path / "two.jsonl", [0.0] * 4, ("c", "d"))
    assert main(["drift", str(two), "--risk", "0.1"]) == 2
    assert "--risk: audited requests ran under 2 certificates" in capsys.readouterr().err


def test_a_certificate_gives_the_risk_and_chooses_the_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(CERTIFICATE))
    log = write_log(tmp_path / "exits.jsonl", [0.0, 1.0, 0.0] * 20, (file_sha256(path), None, "another"))
    assert main(["drift", str(log), "--calibration", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["risk"] == 0.05 and found["audits"] == 20 and found["uncounted"] == 40 and found["mean_loss"] == 0
    assert main(["drift", str(log), "--calibration", str(log)]) == 1
    assert f"{log}: " in capsys.readouterr().err
    assert main(["drift", str(log), "--calibration", str(path), "--risk", "0.1"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_nothing_audited_and_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "exits.jsonl", [])
    plot = tmp_path / "drift.png"
    assert main(["drift", str(log), "--risk", "0.1", "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    assert "nothing can be said" in out and "no audited request counts" in err and not plot.exists()
    for arguments, message in (
        ([str(log), "--risk", "1"], "argument --risk: must be between 0 and 1, not 1"),
        ([str(log), "--risk", "x"], "argument --risk: must be a number, not 'x'"),
        ([str(tmp_path / "none"), "--risk", "0.1"], "LOG: no such file or directory"),
        ([str(log), "--risk", "0.1", "--plot", "a.gif"], "--plot: a.gif must end in one of .png, .pdf, .svg"),
        ([str(log), "--risk", "0.1", "--plot", str(log)], "--plot: "),
    ):
        assert main(["drift", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"megatron-ee drift: error: {message}") and err.count("\n") == 1
