"""A probe over tensor-parallel ranks, stages and data-parallel ranks finds what one process finds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.evaluation.probe.report import probe_dict
from megatron_ee.evaluation.probe.run import probe
from megatron_ee.evaluation.probe.shape import Shape
from megatron_ee.planning.devices import find_device
from megatron_ee.testing.examples import example_architecture
from megatron_ee.testing.project import Project
from megatron_ee.testing.ranks import run_ranks


def probed(model: Path, data: Path, cache: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    """On one rank: all that can be done is done, whatever the machine's speed."""
    os.environ["MEGATRON_EE_CACHE"] = str(cache)
    shapes = [Shape("8b", example_architecture("llama3.1_8b"), find_device("h100"))]
    found = probe(
        model=model, data=data, budget_minutes=60, dtype="float32", tensor=tensor, pipeline=pipeline, shapes=shapes
    )
    return probe_dict(found)


@pytest.mark.slow
def test_equals_one_process(project: Project, tmp_path: Path) -> None:
    arguments = (project.model, project.train, tmp_path)
    (alone,) = run_ranks(1, probed, *arguments, 1, 1)
    assert [each["layer"] for each in alone["layers"]] == [1, 2, 3]
    for world_size, tensor, pipeline in ((2, 1, 2), (4, 2, 1)):  # the second with two data-parallel copies
        results = run_ranks(world_size, probed, *arguments, tensor, pipeline)
        found = results[0]
        assert all(other == found for other in results)
        assert found["parallel"] == {"tensor": tensor, "pipeline": pipeline, "data": world_size // tensor // pipeline}
        for key in ("layers", "body", "fitted", "held_out"):
            assert found["work"][key] == alone["work"][key]
        assert len(found["gate"]) == len(alone["gate"]) == 3
        assert found["final_loss"] == pytest.approx(alone["final_loss"], rel=1e-5)
        for mine, other in zip(found["layers"], alone["layers"], strict=True):
            for key in ("layer", "agreement", "loss", "confidence"):
                assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=2e-3), key
        for part in found["milliseconds"].values():
            assert part.keys() == {"1", "2", "4", "8", "16"} and all(value > 0 for value in part.values())
        # A shape's times do not depend on this machine, so neither do its forecasts.
        (mine,), (other,) = found["shapes"], alone["shapes"]
        assert mine["speculative"]["speedup"] == pytest.approx(other["speculative"]["speedup"], rel=0.02)
