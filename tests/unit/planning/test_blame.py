"""What takes the memory of a plan, in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ee.config.load import config_from_dict
from megatron_ee.planning.blame import blame, blame_host
from megatron_ee.planning.estimate import estimate_run
from megatron_ee.planning.storage import HostMemory
from megatron_ee.testing.models import llama2_7b


@pytest.mark.parametrize(
    "phase, words",
    [
        ("fit", "the fit before tuning, which holds all 32 layers, takes 1,000.0 GB"),
        ("validation", "all 32 layers, for the final exit on validation data, take 1,000.0 GB"),
        ("gates", "the fit of gates, which holds all 32 layers, takes 1,000.0 GB"),
        ("decoding", "threshold mode after tuning, which holds all 32 layers, takes 1,000.0 GB"),
    ],
)
def test_the_largest_phase_is_named(phase: str, words: str, tmp_path: Path) -> None:
    config = config_from_dict(
        {"model": {"path": str(tmp_path), "dtype": "bfloat16"}, "exits": [{"layer": 8}], "data": {"train": ["c"]}}
    )
    estimate = estimate_run(config, llama2_7b(), 1, None)
    (stage,) = estimate.plan.stages
    changed = replace(stage, memory=replace(stage.memory, **{phase: 10**12}))
    vars(estimate)["plan"] = replace(estimate.plan, stages=(changed,))
    assert blame(estimate) == words


@pytest.mark.parametrize(
    "host, words",
    [
        (HostMemory(layers=3 * 10**9, checkpoint=2 * 10**9), "32 streamed layers take 3.0 GB"),
        (HostMemory(gates=4 * 10**9), "the tokens that gates are fitted on take 4.0 GB"),
        (HostMemory(), "Python with its libraries, in 1 process, takes 2.0 GB"),
    ],
)
def test_the_largest_part_of_the_host_memory_is_named(host: HostMemory, words: str, tmp_path: Path) -> None:
    config = config_from_dict(
        {"model": {"path": str(tmp_path), "dtype": "bfloat16"}, "exits": [{"layer": 8}], "data": {"train": ["c"]}}
    )
    estimate = estimate_run(config, llama2_7b(), 1, None)
    vars(estimate)["host"] = host
    assert blame_host(estimate) == words
