"""Speed of every mode on a tiny model, policy gate with the exits that have gates."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.evaluation.speed import TOKENS, good_threshold, measure_speed
from megatron_ee.exits.stage import build_stage
from megatron_ee.model.quality import SweepPoint
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.layout import even_layout
from megatron_ee.testing.models import save_tiny_model

SPECS = (ExitSpec(1, "mlp", "shared", gate=True), ExitSpec(3, "mlp", "shared"))


def test_modes(tmp_path: Path) -> None:
    save_tiny_model("llama2", tmp_path)
    model = open_model(tmp_path)
    with process_groups() as groups:
        setup = build_setup(model.architecture, torch.float32, groups)
        layout = even_layout(model.architecture.num_layers, 1, [1, 3])
        stage = build_stage(setup, layout, SPECS, final_exit=True)
        load_backbone(stage, model)
        for exit_ in stage.exits:
            initialise_exit(exit_, model, 0)
        stage.exits[0].gate.place(torch.zeros(setup.architecture.hidden_size + 1))  # every chance is a half
        prompts = [[5, 6, 7], [8]]
        found = measure_speed(stage, layout, SPECS, prompts, frozenset(), threshold=0.9, gate_threshold=0.4)
        assert [each.mode for each in measure_speed(stage, layout, SPECS[1:], prompts, frozenset(), 0.9, 0.4)] == [
            "full",
            "threshold",
            "speculative",
        ]
    full, threshold, speculative, gate = found
    assert full.speedup == full.agreement == speculative.agreement == 1.0 and full.layers_per_token == 4
    assert [each.threshold for each in found] == [None, 0.9, None, 0.4]
    # Fifteen of sixteen tokens leave by the gate after layer 1. The last ones' other layers never run.
    assert gate.mode == "gate" and gate.layers_per_token < 3
    assert all(each.tokens_per_second > 0 for each in found) and TOKENS > 16


def test_the_threshold_that_is_measured() -> None:
    points = [SweepPoint(t, (), 4.0, agreement, 0.0, ()) for t, agreement in ((0.5, 0.8), (0.9, 0.96), (0.8, 0.95))]
    assert good_threshold(points) == 0.8
    assert good_threshold(points[:1]) == good_threshold([]) == 0.99
