"""Stages whose exits differ in what they say, so that tokens leave at all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from megatron_ee.config.exits import ExitSpec
from megatron_ee.model.stage import Stage


@pytest.fixture(scope="module")
def exit_stage(
    saved_model: Callable[..., tuple], load_stage: Callable[..., Stage]
) -> Callable[[str, Sequence[ExitSpec]], Stage]:
    """Gives a float32 stage of a family with all layers and these exits, disturbed and made confident."""
    made: dict[tuple, Stage] = {}

    def make(family: str, specs: Sequence[ExitSpec]) -> Stage:
        key = (family, *specs)
        if key not in made:
            stage = load_stage(saved_model(family)[0], specs)
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for exit_ in stage.exits:
                    for parameter in exit_.parameters():
                        if parameter.requires_grad:
                            noise = torch.randn(parameter.shape, generator=generator)
                            parameter += 0.05 * noise.to(parameter.device)
                    if exit_.spec.head == "own":
                        exit_.head.weight *= 3
            made[key] = stage
        return made[key]

    return make
