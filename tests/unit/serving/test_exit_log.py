"""The exit log: what is written and left out, rotation, kills, full disks, and that ``drift`` reads it."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from megatron_ee.commands.main import main
from megatron_ee.errors import ConfigError, DamagedError, DataError
from megatron_ee.evaluation.drift.audits import Audit, read_audits
from megatron_ee.inference.requests import Coverage
from megatron_ee.serving import exit_log
from megatron_ee.serving.exit_log import ExitLog, Period, read_logs
from megatron_ee.serving.exit_record import ExitRecord, confidence_bins, exit_statistics, now_utc

DAY = 86_400
NOON = 1_764_504_000  # 2025-11-30T12:00:00Z


def record(number: int, **changes: Any) -> ExitRecord:
    values: dict[str, Any] = {
        **{"number": number, "id": f"cmpl-{number}", "time": now_utc(NOON), "task": "inquiries", "mode": "threshold"},
        **{"policy": "early", "finish_reason": "eos", "prompt_tokens": 12, "tokens": 5, "num_layers": 12},
        **{"tokens_by_layer": {"4": 3, "12": 2}, "confidences": (0,) * 9 + (5,), "layers_per_token": 7.5},
        **{"seconds": 0.5, "time_to_first_token": 0.1},
    }
    return ExitRecord(**{**values, **changes})


class Clock:
    """A clock that the test moves."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def names(directory: Path) -> list[str]:
    """Of the logs, as the docs match them."""
    return sorted(path.name for path in directory.glob("exits*.jsonl*"))


def test_records_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "exits.jsonl"
    coverage = Coverage(status="certified", task="inquiries", certificate="c" * 64)
    written = [record(0), record(1, key="desk", tier="important", calibration=coverage, audit=Audit(loss=0.5))]
    log = ExitLog(path)
    assert all([log.write(each) for each in written])
    log.close()
    assert list(read_logs([path])) == written
    assert path.stat().st_mode & 0o777 == 0o600
    assert written[0].day == "2025-11-30"
    with pytest.raises(ValidationError, match="confidences"):
        record(0, confidences=(1, 2))
    with pytest.raises(ValidationError, match="time"):
        record(0, time="yesterday")


def test_text_is_written_only_where_it_was_asked_for(tmp_path: Path) -> None:
    secret = "tell nobody"
    coverage = Coverage(status="full", task="t", certificate="c", reason=f"stop: ('{secret}',), but it was another")
    full = record(0, prompt=secret, text=(secret,), calibration=coverage)
    for text in (False, True):
        path = tmp_path / f"{text}.jsonl"
        log = ExitLog(path, text=text)
        log.write(full)
        log.close()
        line = path.read_text()
        assert (secret in line) is text
        assert ("prompt" in json.loads(line)) is text
        [found] = read_logs([path])
        assert found.calibration is not None
        assert found.calibration.reason == (coverage.reason if text else "stop")
        assert (found == full) is text


def test_a_log_is_rotated_by_size_and_the_oldest_are_removed(tmp_path: Path) -> None:
    size = len(record(0).model_dump_json(exclude={"prompt", "text"})) + 1
    log = ExitLog(tmp_path / "exits.jsonl", max_bytes=2 * size + size // 2, backups=2, clock=Clock())
    for number in range(10):
        log.write(record(number))
    log.close()
    assert names(tmp_path) == ["exits.2025-11-30.3.jsonl", "exits.2025-11-30.4.jsonl", "exits.jsonl"]
    order = [tmp_path / name for name in names(tmp_path)]
    assert [each.number for each in read_logs(order)] == [4, 5, 6, 7, 8, 9]
    os.utime(tmp_path / "exits.jsonl", (NOON, NOON))
    log = ExitLog(tmp_path / "exits.jsonl", max_bytes=1, backups=0, clock=Clock())
    for number in (10, 11):  # each is larger than the limit
        log.write(record(number))
    log.close()
    assert names(tmp_path)[2:] == ["exits.2025-11-30.5.jsonl", "exits.2025-11-30.6.jsonl", "exits.jsonl"]


@pytest.mark.parametrize(("when", "step"), [("hour", 3600), ("day", DAY)])
def test_a_log_is_rotated_by_time(tmp_path: Path, when: Period, step: int) -> None:
    clock = Clock()
    log = ExitLog(tmp_path / "exits.jsonl", when=when, clock=clock)
    for number in range(3):
        log.write(record(2 * number))
        log.write(record(2 * number + 1))
        clock.now += step
    log.close()
    middle = ["2025-11-30T12", "2025-11-30T13"] if when == "hour" else ["2025-11-30", "2025-12-01"]
    assert names(tmp_path) == [*(f"exits.{name}.jsonl" for name in middle), "exits.jsonl"]
    assert [each.number for each in read_logs([tmp_path / f"exits.{middle[1]}.jsonl"])] == [2, 3]
    assert get_args(Period) == ("hour", "day")


def test_a_server_goes_on_with_the_log_of_an_earlier_one(tmp_path: Path) -> None:
    path, clock = tmp_path / "exits.jsonl", Clock()
    log = ExitLog(path, clock=clock)
    assert log.next_number == 0
    log.write(record(7))
    log.write(record(3))
    with pytest.raises(ConfigError, match="another process writes"):
        ExitLog(path)
    log.close()
    path.write_bytes(path.read_bytes() + b'{"number":8,"id":"half')  # killed
    assert [each.number for each in read_logs([path])] == [7, 3]
    log = ExitLog(path, clock=clock)
    assert log.next_number == 8
    clock.now = path.stat().st_mtime + DAY  # the file is of the day on which it was written
    log.write(record(8))
    log.close()
    assert [each.number for each in read_logs([path])] == [8]
    path.unlink()
    (tmp_path / "exits-jsonl.number").unlink()  # earlier versions had none
    log = ExitLog(path, clock=clock)
    assert log.next_number == 8  # from the rotated one
    log.close()


@pytest.mark.parametrize("call", ["rename", "unlink"])
def test_a_log_that_cannot_be_rotated_goes_on(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = tmp_path / "exits.jsonl"
    log = ExitLog(path, max_bytes=1, backups=1, clock=Clock())
    written = [log.write(record(number)) for number in range(2)]
    monkeypatch.setattr(*((os, "rename") if call == "rename" else (Path, "unlink")), refuse)
    written += [log.write(record(number)) for number in range(2, 5)]
    log.close()
    assert written == [True] * 5 and log.lost == 0
    assert sorted(each.number for each in read_logs(list(tmp_path.glob("exits*.jsonl*")))) == [0, 1, 2, 3, 4]
    assert [each.message for each in caplog.records if "Permission denied" in each.message] == [caplog.messages[0]]


@pytest.mark.parametrize("renamed", [True, False])
def test_a_log_that_somebody_else_has_moved_is_begun_again(tmp_path: Path, renamed: bool) -> None:
    path = tmp_path / "exits.jsonl"
    log = ExitLog(path, clock=Clock())
    assert log.write(record(0))
    path.rename(tmp_path / "exits.jsonl.1") if renamed else path.unlink()
    assert log.write(record(1))
    log.close()
    assert [each.number for each in read_logs([path])] == [1]


@pytest.mark.parametrize("killed", [True, False])
def test_numbers_go_on_if_somebody_else_has_moved_the_log(tmp_path: Path, killed: bool) -> None:
    path, moved = tmp_path / "exits.jsonl", tmp_path / "archive" / "exits.jsonl.1"
    log = ExitLog(path, clock=Clock())
    for number in (0, 7, 3):
        assert log.write(record(number))
    if killed:  # nothing is written at the end
        os.close(log._fd)
    else:
        log.close()
    moved.parent.mkdir()
    path.rename(moved)
    log = ExitLog(path, clock=Clock())
    assert log.next_number == 8
    assert log.write(record(8))
    log.close()
    assert [each.number for each in read_audits([moved, path])] == []
    (tmp_path / "exits-jsonl.number").write_text("many\n")
    with pytest.raises(ConfigError, match="exits-jsonl.number does not hold the number .*; remove it"):
        ExitLog(path)
    (tmp_path / "exits-jsonl.number").unlink()
    log = ExitLog(path, clock=Clock())  # it is not locked by the attempt before
    assert log.next_number == 9
    log.close()


def test_a_number_that_cannot_be_kept_costs_no_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, kept = tmp_path / "exits.jsonl", tmp_path / "exits-jsonl.number"
    log = ExitLog(path, clock=Clock())
    kept.unlink()
    kept.mkdir()
    assert log.write(record(0)) and log.write(record(1))
    log.close()
    assert [each.number for each in read_logs([path])] == [0, 1]
    assert caplog.messages == [f"{path}: exits-jsonl.number cannot be written: Is a directory"]


def test_a_file_that_is_no_exit_log_is_left_alone(tmp_path: Path) -> None:
    for content in (b"my notes", b"my notes\nmore\n", b'{"a": 1}\n', b'{"a": 1}', b'{\n  "a": 1\n}'):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="--exit-log: .*file"):
            ExitLog(path)
        assert path.read_bytes() == content
    with pytest.raises(ConfigError, match="is no regular file"):
        ExitLog(tmp_path)


def test_a_full_disk_costs_records_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "exits.jsonl"
    log = ExitLog(path)
    assert log.write(record(0))

    def half(fd: int, data: memoryview) -> None:
        exit_log.os.write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(exit_log, "write_all", half)
        assert not log.write(record(1))
        assert not log.write(record(2))
    assert log.lost == 2
    assert [each.getMessage() for each in caplog.records] == [
        f"{path}: cannot be written: No space left on device; records of requests are lost"
    ]
    assert log.write(record(3))
    log.close()
    assert [each.number for each in read_logs([path])] == [0, 3]


def test_compressed_and_damaged_logs(tmp_path: Path) -> None:
    lines = "".join(record(number).model_dump_json() + "\n" for number in range(300)).encode()
    packed = tmp_path / "exits.2025-11-30.jsonl.gz"
    packed.write_bytes(gzip.compress(lines))
    assert [each.number for each in read_logs([packed])] == list(range(300))
    packed.write_bytes(gzip.compress(lines)[:-900])
    cut = [each.number for each in read_logs([packed])]
    assert cut == list(range(len(cut))) and 0 < len(cut) < 300
    plain = tmp_path / "exits.jsonl"
    plain.write_bytes(lines[:-10])
    assert len(list(read_logs([plain]))) == 299
    plain.write_bytes(lines[:50] + b"\n" + lines)
    with pytest.raises(DamagedError, match=rf"{plain}:1: not valid JSON"):
        list(read_logs([plain]))
    plain.write_bytes(b'{"number": 1}\n')
    with pytest.raises(DataError, match=rf"{plain}:1: \w+: missing"):
        list(read_logs([plain]))
    plain.write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(DataError, match=f"{plain}: cannot be read"):
        list(read_logs([plain]))


def test_drift_reads_the_exit_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = len(record(0).model_dump_json()) + 100
    log = ExitLog(tmp_path / "exits.jsonl", max_bytes=20 * size, clock=Clock())
    for number in reversed(range(80)):  # requests end in another order than that of their admission
        loss = float(number >= 60)
        log.write(record(number, audit=Audit(loss=loss, certificate="c") if number % 2 else None))
    log.close()
    logs = sorted(tmp_path.glob("exits*.jsonl"))
    assert len(logs) > 3
    assert [each.number for each in read_audits(logs)] == list(range(1, 80, 2))
    packed = logs[0].with_name(f"{logs[0].name}.gz")
    packed.write_bytes(gzip.compress(logs[0].read_bytes()))
    logs[0].unlink()
    assert main(["drift", *map(str, [packed, *logs[1:]]), "--risk", "0.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["audits"] == 40 and found["mean_loss"] == 0.25
    assert found["restarting"]["alarms"][0]["number"] > 60


def test_statistics_of_several_outputs_are_summed() -> None:
    def completion(tokens: int, runs: int, by_layer: dict[str, int], wait: float | None) -> Any:
        statistics = {
            **{"prompt_tokens": 9, "reused_tokens": 4, "tokens": tokens, "tokens_by_layer": by_layer},
            **{
                "later_tokens": max(tokens - 1, 0),
                "layer_runs": runs,
                "rounds": 1,
                "proposed": 3,
                "accepted": 2,
                "time_to_first_token": wait,
            },
            "confidences": [0.95] * tokens,
        }
        return SimpleNamespace(finish_reason="length", statistics=statistics)

    outputs = [completion(5, 24, {"4": 4, "12": 1}, 0.3), completion(3, 24, {"12": 3}, 0.2)]
    found = exit_statistics(outputs)
    assert record(0, **found).tokens == 8
    assert found["tokens_by_layer"] == {"4": 4, "12": 4}
    assert found["later_tokens"] == 6 and found["layers_per_token"] == 8.0  # 4 tokens at 6 layers, 2 at 12
    assert (found["proposed"], found["accepted"], found["prompt_tokens"], found["outputs"]) == (6, 4, 9, 2)
    assert found["time_to_first_token"] == 0.2 and found["confidences"][9] == 8
    none = exit_statistics([completion(0, 0, {}, None)])
    assert none["layers_per_token"] is None and none["time_to_first_token"] is None
    assert record(0, **exit_statistics([])).tokens == 0


def test_confidences_fall_into_ten_bins() -> None:
    counts = confidence_bins([0.0, 0.05, 0.1, 0.999, 1.0, 1.0000001, -1e-9, math.nan])
    assert counts == (3, 1, 0, 0, 0, 0, 0, 0, 0, 3)
