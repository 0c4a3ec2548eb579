"""wandb in offline mode: what it records is what TensorBoard has, and nothing reaches the network."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ee.config.schema import LoggingConfig, WandbConfig
from megatron_ee.errors import ConfigError
from megatron_ee.model.quality import ExitQuality, Quality
from megatron_ee.tuning.log import RunLog
from megatron_ee.tuning.step import ExitResult, StepResult
from megatron_ee.tuning.wandb_run import WandbRun, check_wandb

Points = dict[str, list[tuple[int, float]]]
LOGGING = LoggingConfig(wandb=WandbConfig(project="exits"))
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[bytes]]:
    """What anybody in this process, or started by it, sends to the network: it goes to a proxy that takes nothing."""
    received: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            with connection:
                received.append(connection.recv(1000))

    for name in PROXIES:
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
    for name in ("NO_PROXY", "no_proxy", "WANDB_API_KEY", "WANDB_MODE", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    thread = threading.Thread(target=accept)
    thread.start()
    yield received
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # its service process, which has this environment
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


def wandb_points(files: list[Path]) -> tuple[set[str], Points]:
    """Ids of the runs, and every figure by name as (step, value)."""
    ids, points = set(), Points()
    for record in (record for file in files for record in records(file)):
        if record.HasField("run"):
            ids.add(record.run.run_id)
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if name != "step" and not name.startswith("_"):
                    points.setdefault(name, []).append((row["step"], value))
    return ids, points


def board_points(directory: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def log_step(log: RunLog, step: int) -> None:
    log.step(step, StepResult(64, 1e-3, 0.5, (ExitResult(2, 3.0 + step, 1.0, 0.5),)), 100.0)


def test_it_has_what_tensorboard_has_also_after_going_on(connections: list[bytes], tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    quality = Quality(9, 4, 1.5, 0.5, (ExitQuality(2, 2.5, 0.25, 0.75, 0.5, 0.125, 0.25, bins=()),), sweep=())
    with RunLog(output, LOGGING, 0, settings={"tuning": {"steps": 3}}) as log:
        log.validation(0, 0, quality)
        log_step(log, 1)
        log_step(log, 2)
        log.save(1, 0.25, 0.5)  # in the background, reported late
    sys.modules["wandb"].teardown()  # as at the end of the process: all is on disk then
    with RunLog(output, LOGGING, 2) as log:
        log_step(log, 3)
    sys.modules["wandb"].teardown()
    files = sorted(output.glob("wandb/offline-run-*/*.wandb"))
    ids, found = wandb_points(files)
    assert len(files) == 2 and ids == {(output / "wandb" / "run_id").read_text().strip()}
    expected = board_points(output / "tensorboard")
    assert found.keys() == expected.keys() and {"exit_2/loss", "validation/exit_2/ece", "save/write_seconds"} <= {
        *found
    }
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points]), name
    with RunLog(output, LOGGING, 0):
        pass
    assert (output / "wandb" / "run_id").read_text().strip() not in ids, "a run from the beginning is another one"
    assert connections == []


def test_tuning_goes_on_where_wandb_fails(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def log(points: dict[str, float]) -> None:
        calls.append(points)
        raise ConnectionError("the service has ended")

    run = WandbRun(SimpleNamespace(log=log, finish=lambda **_: pytest.fail("after it failed")))
    for step in (1, 2):
        run.log({"loss": 3.0}, step)
    run.finish(failed=False)
    assert calls == [{"loss": 3.0, "step": 1}]
    assert capsys.readouterr().err == "wandb: recording has stopped: the service has ended\n"


def test_online_without_an_account_is_refused_early(connections: list[bytes]) -> None:
    with pytest.raises(ConfigError, match=r"logging\.wandb\.mode: online: .*API key"):
        check_wandb(WandbConfig("exits", mode="online"))
    assert connections == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(WandbConfig())
    with pytest.raises(ConfigError, match=r"megatron-ee\[wandb\]"):
        check_wandb(WandbConfig("exits"))
