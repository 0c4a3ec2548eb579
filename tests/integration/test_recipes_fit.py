"""The configurations for one GPU fit it in every phase, and the page that lists them shows their plans."""

from __future__ import annotations

import pytest

from megatron_ee.planning.estimate import estimate_run
from megatron_ee.testing.examples import EXAMPLES, RECIPES, example_architecture, open_example


def test_there_are_recipes_for_both_sizes() -> None:
    assert sorted(RECIPES.values()) == [24, 24, 24, 80, 80, 80, 80]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str) -> None:
    config, specs, _ = open_example(recipe, processes=1)
    assert all((spec.body, spec.head, spec.init) == ("mlp", "shared", "fit") for spec in specs)
    estimate = estimate_run(config, example_architecture(recipe), 1, None)
    needed = estimate.needed / 1e9
    assert needed <= RECIPES[recipe]
    figures = f"{len(specs)} | {config.model.residency} | {needed:.1f} GB | {estimate.host_needed / 1e9:.0f} GB"
    row = f"| [{recipe}]({recipe}) | {figures} |"
    assert row in (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines()
