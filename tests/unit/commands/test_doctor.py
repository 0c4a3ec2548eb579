"""What doctor finds on this machine, on a broken one, and on one that limits what works; without a network."""

from __future__ import annotations

import errno
import json
import os
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from megatron_ee import platform
from megatron_ee.commands import machine
from megatron_ee.commands.machine import Finding, check_machine
from megatron_ee.commands.main import main


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine's own addresses may be reached or looked up."""
    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", address
        connect(self, address)

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"looked up {arguments}")

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setattr(socket, "gethostbyname", refuse)
    monkeypatch.delenv("RANK", raising=False)


def find(name: str, output: Path, **options: bool) -> Finding:
    (found,) = (finding for finding in check_machine(output, **options) if finding.name == name)
    return found


def test_this_machine_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--output", str(tmp_path / "new"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    names = [finding["name"] for finding in answer["findings"]]
    for name in ("python", "torch", "megatron-core", "process group", "file locks", "disk", "port", "apex", "memory"):
        assert name in names
    assert answer["works"] and not os.listdir(tmp_path)
    assert main(["doctor", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names) and out.endswith("tuning and generating work here\n")


def test_a_launchers_environment_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes are neither looked up nor waited for."""
    launched = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert find("process group", tmp_path).severity == "ok"


def test_a_missing_and_an_untested_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = metadata.version

    def changed(name: str) -> str:
        if name == "sentencepiece":
            raise metadata.PackageNotFoundError(name)
        return "0.99.0" if name == "megatron-core" else version(name)

    monkeypatch.setattr(metadata, "version", changed)
    core = find("megatron-core", tmp_path)
    assert core.severity == "warning" and "0.99.0 was not tested" in core.found
    assert main(["doctor", "--output", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "all required ones" not in out
    assert "pip install 'sentencepiece" in out and out.endswith("tuning does not work here: see the errors\n")


def test_another_package_named_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemError('not imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = find("apex", tmp_path)
    assert found.severity == "warning" and "is not NVIDIA's package" in found.found


@pytest.mark.parametrize("locks", ["none", "no effect"])
def test_a_file_system_without_locks(locks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        if locks == "none":
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(machine.fcntl, "flock", flock)
    assert find("file locks", tmp_path).severity == "warning"


def test_an_output_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = find("output", tmp_path / "file" / "run")
    assert found.severity == "error" and str(tmp_path / "file") in found.found


def test_a_control_group_with_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "control_group_limits", lambda: [(2**60, 0), (3 * 10**9, 2 * 10**9)])
    monkeypatch.setattr(platform, "free_host_memory", lambda: 10**9)
    (found,) = machine._memory()
    assert found.severity == "warning" and "use 3.0 GB, of which 1.0 GB are free" in found.found


def test_the_lock_of_a_killed_compiler_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads DeepSpeed's CPU Adam waits for this file to vanish."""
    build = tmp_path / "py311_cpu" / "cpu_adam"
    build.mkdir(parents=True)
    for name in ("cpu_adam.so", "lock"):
        (build / name).touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(metadata, "version", lambda name: "0.19.8")
    for compiles in (False, True):
        (found,) = machine._deepspeed(compiles)
        assert found.severity == "warning" and f"delete {build / 'lock'}" in found.advice
    (build / "lock").unlink()
    (found,) = machine._deepspeed(False)
    assert found.severity == "ok" and f"compiled under {tmp_path}" in found.found


def test_a_broken_check_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libcudart.so.12: cannot open shared object file\nmore")

    monkeypatch.setattr(machine, "_gpu", broken)
    monkeypatch.setattr(machine, "_process_group", broken)
    optional, needed = find("GPU", tmp_path), find("process group", tmp_path)
    assert (optional.severity, needed.severity) == ("warning", "error")
    assert optional.found == "the check failed: ImportError: libcudart.so.12: cannot open shared object file"


def test_other_load_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert find("processors", tmp_path).severity == "ok"
    monkeypatch.setattr(os, "getloadavg", lambda: (100.0, 0.0, 0.0))
    assert find("processors", tmp_path).severity == "warning"
