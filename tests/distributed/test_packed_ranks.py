"""Packed weights on several ranks: the same losses and gradients as expanded ones, also where ranks cut groups."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_ee.config.exits import ExitSpec
from megatron_ee.testing import quantised as recipes
from megatron_ee.testing.quantised import save_quantised_model
from megatron_ee.testing.ranks import run_ranks
from megatron_ee.testing.tuning import Case, Outcome, tune_cases

SPECS = (ExitSpec(1, "mlp", "shared"), ExitSpec(3, "layer"))
WHOLE = (((1, 3), (1, 3)),)


def losses(outcome: Outcome) -> list[float]:
    return [exit_.loss for result in outcome.results for exit_ in result.exits]


@pytest.mark.slow
def test_packed_equals_expanded_on_tensor_parallel_ranks_and_stages(tmp_path: Path) -> None:
    """Half of 112 columns are three and a half groups of 16, and half of the key's rows 4 words of AWQ."""
    models = {"gptq": tmp_path / "gptq", "awq": tmp_path / "awq", "fp8": tmp_path / "fp8"}
    save_quantised_model("llama3.1", models["gptq"], recipes.gptq(act_order=True))
    save_quantised_model("llama3.1", models["awq"], recipes.awq())
    save_quantised_model("llama3.1", models["fp8"], recipes.fp8())
    alone = [Case(name, name, SPECS, WHOLE) for name in models]
    cut = [dataclasses.replace(case, name=f"{case.name}-cut", tensor=2, sequence=True) for case in alone]
    stages = Case("awq-stages", "awq", SPECS, (((1, 2), (1,)), ((3, 3), (3,))))
    shared = [*cut, stages]
    expanded = [dataclasses.replace(case, name=f"{case.name}-expanded", weights="expanded") for case in shared]
    (first,) = run_ranks(1, tune_cases, models, alone, tmp_path / "alone", None, 1)
    ranks = run_ranks(2, tune_cases, models, [*shared, *expanded], tmp_path / "ranks", None, 1)
    reference = dict(zip(models, first, strict=True))
    for outcomes in ranks:
        for case, packed, wide in zip(shared, outcomes, outcomes[len(shared) :], strict=False):
            assert packed.results == wide.results, case.name
            assert losses(packed) == pytest.approx(losses(reference[case.family]), rel=1e-5), case.name
