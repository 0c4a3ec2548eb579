"""``tools/gpu_check.sh`` at toy size without a GPU: its checks, its table, and what a check that fails does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools/gpu_check.sh"


def run(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MEGATRON_EE_GPU_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {} if path is None else {"PATH": path}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=900
    )


def skipped(*names: str) -> list[str]:
    return [word for name in names for word in ("--skip", name)]


def results(done: subprocess.CompletedProcess[str]) -> dict[str, set[str]]:
    """By check, the results in the table."""
    found: dict[str, set[str]] = {}
    for line in done.stdout.splitlines()[2:]:
        name, *words = line.split()
        found.setdefault(name, set()).update(set(words) & {"good", "FAILED", "-"})
    return found


def test_without_cuda_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = run(path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "gpu_check: there is no CUDA device here (nvidia-smi finds none); no check was run\n"


def test_a_check_that_takes_too_long_stops_no_other() -> None:
    done = run("--device", "cpu", "--small", "--seconds", "1", *skipped("tests", "commands", "compiled"))
    assert done.returncode == 1, done.stderr
    assert results(done) == {name: {"FAILED"} for name in ("parity", "tune", "decode")}
    assert done.stdout.count("took more than 1 s") == 3


def test_a_wrong_argument_is_refused() -> None:
    done = run("--device", "cpu", "--skip", "everything")
    assert done.returncode == 2 and "invalid choice: 'everything'" in done.stderr


@pytest.mark.slow
def test_every_check_at_toy_size() -> None:
    """The limits of speed and memory hold for a GPU alone; all else must be good here too.

    Compiling takes minutes on a CPU, and has tests of its own.
    """
    done = run("--device", "cpu", "--small", "--seconds", "400", *skipped("compiled"))
    assert done.returncode == 0, done.stderr
    found = results(done)
    assert found == {
        "parity": {"good"},
        "tune": {"good", "-"},
        "decode": {"good", "-"},
        "commands": {"good"},
        "tests": {"good"},
    }
