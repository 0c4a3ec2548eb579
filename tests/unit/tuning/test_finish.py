"""Gates of several adapters after tuning, in one pass through all layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import DataConfig, FitConfig, ModelConfig, RunConfig, TuningConfig
from megatron_ee.exits.stage import build_stage
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import Groups
from megatron_ee.parallel.layout import even_layout
from megatron_ee.testing.tuning import RandomBlend
from megatron_ee.tuning import finish
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt

SPECS = (ExitSpec(1, "mlp", init="random"), ExitSpec(3, "norm", init="random"))


def test_one_pass_gives_each_adapter_the_gates_of_its_own(
    saved_model: Any,
    groups: Groups,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = saved_model("llama2")[0]
    model = open_model(path)
    setup = build_setup(model.architecture, torch.float32, groups)
    exits = build_stage(setup, even_layout(4, 1, [1, 3]), SPECS).exits
    names = {"adapter": 7, "adapter-best": 5, "again": 7}
    for name, step in names.items():
        for exit_ in exits:
            initialise_exit(exit_, model, seed=step)
        save_adapter(tmp_path / name, exits, SPECS, groups, base_model="", backbone_sha256="0" * 64, steps=step)
        shutil.copytree(tmp_path / name, tmp_path / "alone" / name)
    config = RunConfig(
        ModelConfig(str(path)),
        [],
        DataConfig([], sequence_length=32),
        tuning=TuningConfig(global_batch_size=4, micro_batch_size=2),
        fit=FitConfig(tokens=400),
    )
    passes: list[int] = []
    collect = finish.fit_gates

    def counted(taught: Any, sets: Any, *arguments: Any) -> Any:
        passes.append(len(sets))
        return collect(taught, sets, *arguments)

    def add(*paths: Path) -> None:
        finish.add_gates(config, FullModel(setup, model, Interrupt()), paths, {1, 3}, RandomBlend(32))  # type: ignore[arg-type]

    monkeypatch.setattr(finish, "fit_gates", counted)
    add(*(tmp_path / name for name in names))
    assert passes == [2]  # the sets of exits after steps 7 and 5
    said = capsys.readouterr().err
    assert "Gates of adapter and again, fitted on" in said and "Gates of adapter-best, fitted on" in said
    for name in names:
        add(tmp_path / "alone" / name)
        found, expected = (load_file(place / name / "exits.safetensors") for place in (tmp_path, tmp_path / "alone"))
        assert found["exits.1.gate.weight"].abs().max() > 0 and found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
