"""``benchmark tune`` and ``benchmark load`` through the command line, on models that take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.benchmark.shape import Step
from megatron_ee.commands.main import main

ROOT = Path(__file__).resolve().parents[3]
TUNE = ["--hidden", "32", "--layers", "4", "--vocab", "200", "--sequence-length", "32", "--repeats", "2"]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "megatron_ee", "benchmark", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=900)


@pytest.mark.slow
def test_tune_as_json() -> None:
    result = benchmark("tune", *TUNE, "--exits", "1", "3", "--dtype", "float32", "--json")
    assert result.returncode == 0, result.stderr
    data: dict[str, Any] = json.loads(result.stdout)
    assert set(data) == {"machine", "model", "steps", "exit_loss"}
    assert data["model"]["hidden"] == 32
    assert data["machine"]["load_before"] >= 0
    assert [(step["dtype"], step["exits"]) for step in data["steps"]] == [("float32", [3]), ("float32", [1, 2, 3])]
    for step in data["steps"]:
        for side in (step["ours"], step["plain"]):
            assert len(side["step_seconds"]) == 2
            assert side["tokens_per_second"] == pytest.approx(32 / (sum(side["step_seconds"]) / 2))
            assert side["peak_memory"] > 50e6  # torch itself is larger
            assert side["matmul_share"] > 0
        ours, plain = step["ours"], step["plain"]
        assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-4)
        assert step["speed_ratio"] == pytest.approx(ours["tokens_per_second"] / plain["tokens_per_second"])
        assert step["memory_ratio"] == pytest.approx(ours["peak_memory"] / plain["peak_memory"])
    (loss,) = data["exit_loss"]
    assert set(loss) == {"dtype", "seconds", "losses", "speed_ratio", "matmul_share"}
    assert loss["speed_ratio"]["plain"] == pytest.approx(loss["seconds"]["plain"] / loss["seconds"]["ours"])
    assert "benchmark tune" in result.stderr or "exit loss" in result.stderr


def test_load_as_json(small_step: Step) -> None:
    result = benchmark("load", "--model", small_step.directory, "--repeats", "2", "--json")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["model"]["path"] == small_step.directory
    assert data["model"]["bytes"] == 4 * small_step.shape.parameters
    assert (data["model"]["dtype"], data["model"]["stored_dtype"]) == ("float32", "float32")
    assert data["load_ratio"] == pytest.approx(data["load_seconds"] / data["read_seconds"])
    assert data["load_keep_ratio"] == pytest.approx(data["load_seconds"] / data["keep_seconds"])
    assert data["hash_ratio"] == pytest.approx(data["hash_seconds"] / data["load_seconds"])
    assert data["load_rate"] == pytest.approx(data["model"]["bytes"] / data["load_seconds"])
    assert data["sha256_rate"] > 0


@pytest.mark.slow
def test_load_of_a_random_model_as_a_table() -> None:
    result = benchmark("load", "--size-mb", "2", "--repeats", "1")
    assert result.returncode == 0, result.stderr
    assert "Loading against reading the same bytes" in result.stdout
    assert "stored bfloat16, loaded bfloat16" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "megatron-ee benchmark: error: the following arguments are required: {tune,load,pipeline,memory,conv"),
        (["tune", "--hidden", "0"], 2, "megatron-ee benchmark: error: argument --hidden: must be at least 1, not 0"),
        (["tune", "--heads", "5"], 2, "megatron-ee benchmark: error: --heads: 5 heads do not share a hidden size"),
        (["tune", "--exits", "10"], 2, "megatron-ee benchmark: error: --exits: 10 exits do not fit 9 layers"),
        (["tune", "--dtype", "float16"], 2, "megatron-ee benchmark: error: argument --dtype: invalid choice"),
        (["pipeline", "--plot", "a.gif"], 2, "megatron-ee benchmark: error: argument --plot: must end in one of .png"),
        (["pipeline", "--exits", "13"], 2, "megatron-ee benchmark: error: --exits: 13 exits do not fit 12 layers"),
        (["memory", "--tensor", "3"], 2, "megatron-ee benchmark: error: --tensor: 3 does not divide 16 heads"),
        (["memory", "--sequence-parallel"], 2, "megatron-ee benchmark: error: --sequence-parallel: needs --tensor"),
        (["load", "--size-mb", "1", "--model", "m"], 2, "megatron-ee benchmark: error: argument --model: not allowed"),
        (["load", "--model", "no-such"], 1, "megatron-ee benchmark: error: no-such/config.json: "),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(message)
