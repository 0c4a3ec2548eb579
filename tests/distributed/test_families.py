"""Tensor, sequence and pipeline parallelism of families whose layers differ from Llama's: as one process computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_parity import EVERY_BODY, HALVES, ONE, PLAIN, _check_results, _check_state

from megatron_ee.testing.project import saved_tensors
from megatron_ee.testing.ranks import run_ranks
from megatron_ee.testing.tuning import Case, tune_cases

FAMILIES = ("gemma3", "phi3", "granite", "olmo2", "smollm3", "gemma2")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_compute_what_one_does(
    family: str, saved_model: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    """All bodies, one step: tensor parallelism without and with sequence parallelism, then two stages."""
    models = {family: saved_model(family)[0]}
    case = Case("alone", family, EVERY_BODY, ONE, loss=PLAIN, micro_batch_size=3)
    cases = [
        dataclasses.replace(case, name="tensor", tensor=2),
        dataclasses.replace(case, name="sequence", tensor=2, sequence=True),
        dataclasses.replace(case, name="pipeline", stages=HALVES),
    ]
    ((expected,),) = run_ranks(1, tune_cases, models, [case], tmp_path / "alone")
    ranks = run_ranks(2, tune_cases, models, cases, tmp_path / "two")
    for number, each in enumerate(cases):
        for rank in ranks:
            _check_results(each, rank[number], expected)
        for path, reference in zip(ranks[0][number].checkpoints, expected.checkpoints, strict=True):
            _check_state(each, saved_tensors(path), saved_tensors(reference))
