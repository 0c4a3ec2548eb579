"""Stages whose exits differ in what they say, so that tokens leave at all of them; and what a full pass says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage


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
                        exit_.head.matrix.weight *= 3
            made[key] = stage
        return made[key]

    return make


@pytest.fixture(scope="session")
def every_logit() -> Callable[[Stage, Sequence[int]], dict[int, Tensor]]:
    """Gives the logits ``[tokens, vocab]`` of all exits, by layer, and of the final one, by the number after it.

    One pass of all tokens through all layers, without cache: at each position what computing everything anew says.
    """

    @torch.no_grad()
    def run(stage: Stage, ids: Sequence[int]) -> dict[int, Tensor]:
        positions = stage.backbone.positions(len(ids))
        h = stage.backbone.embed(torch.tensor([list(ids)], device=platform.device()))
        h, taps = stage.run_layers(h, positions, to_end=True)
        exits = {e.spec.layer: e.head.logits(e.features(taps[e.spec.layer], positions))[:, 0] for e in stage.exits}
        final = stage.setup.architecture.num_layers + 1
        return {**exits, final: stage.final_logits(stage.final_features(h))[:, 0]}

    return run
