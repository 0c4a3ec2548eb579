"""``plan --measured`` on two gloo ranks: both measure themselves and the link, and the first prints."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.commands.main import main
from megatron_ee.testing.examples import MODELS
from megatron_ee.testing.ranks import run_ranks

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 512}
CONFIG = """
exits: [{layer: 2}, {layer: 3}, {layer: 4, body: layer, head: shared}, {layer: 5, body: norm, head: low_rank, rank: 4}]
data: {train: [c], sequence_length: 64}
loss: {distillation: {kl: 1.0}}
tuning: {steps: 10, global_batch_size: 4}
"""


def planned(path: Path, *options: str) -> str:
    """What one rank prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["plan", "--config", str(path / "run.yaml"), "--measured", "--json", *options]) == 0
    return printed.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**MODELS["llama2_7b"], **SMALL, **heads}))
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tmp_path}, dtype: float32}}\n{CONFIG}")
    return tmp_path


def check(found: dict[str, Any], gpus: int) -> None:
    run = found["run"]
    assert run["gpus"] == gpus and 0 < run["step_seconds"] < 60 and run["kilowatt_hours"] is None
    assert all(seconds >= 0 for stage in run["stages"] for seconds in stage["seconds"].values())
    assert any("measured just now on this machine (CPU" in line for line in found["basis"])
    assert found["best"][0]["step_seconds"] <= run["step_seconds"]


@pytest.mark.slow
def test_two_ranks(run: Path) -> None:
    first, second = run_ranks(2, planned, run, "--parallel.tensor", "2")
    assert second == ""
    found = json.loads(first)
    check(found, 2)
    assert found["run"]["stages"][0]["seconds"]["tensor"] > 0
    assert any("; link " in line for line in found["basis"])


def test_one_process(run: Path) -> None:
    """It has no link, and plans for itself."""
    found = json.loads(planned(run))
    check(found, 1)
    assert not any("; link " in line for line in found["basis"])
