"""What packed layers take: from ``config.json`` alone, as much as loaded ones do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.checkpoint.packing import pack_layers
from megatron_ee.checkpoint.saved_model import open_model, quantise_layers
from megatron_ee.config.schema import DataConfig, ModelConfig, RunConfig
from megatron_ee.exits.stage import Stage
from megatron_ee.families.quantisation import packed_bits
from megatron_ee.families.registry import read_architecture
from megatron_ee.model.setup import build_setup
from megatron_ee.planning.parameters import layer_bytes
from megatron_ee.planning.read_model import read_model
from megatron_ee.planning.workload import make_workload
from megatron_ee.testing import quantised as recipes
from megatron_ee.testing.quantised import Recipe, save_quantised_model

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
RECIPES: dict[str, Callable[[], Recipe]] = {
    "gptq": lambda: recipes.gptq(group=64),
    "awq": lambda: recipes.awq(64),
    "fp8": lambda: recipes.fp8((128, 128)),
    "int4": lambda: recipes.compressed_tensors(
        "pack-quantized", torch.bfloat16, num_bits=4, strategy="group", group_size=32
    ),
}


def planned(path: Path, **model: Any) -> tuple[int, int]:
    """Bytes of a packed layer, and number of slots."""
    settings = ModelConfig(str(path), dtype="bfloat16", **model)
    config, architecture, _ = read_model(RunConfig(settings, [], DataConfig([])))
    workload = make_workload(config, architecture, 1)
    return layer_bytes(architecture, workload.itemsize, workload.packed_bits), workload.slots


def held(path: Path, groups: Any, quantise: Any = "none") -> int:
    model = quantise_layers(open_model(path), quantise, "model.quantise")
    setup = build_setup(model.architecture, torch.bfloat16, groups, slots=1)
    stage = Stage(setup, range(1, 3), ())
    return pack_layers(stage.backbone, model)[1].nbytes


@pytest.mark.parametrize("name", RECIPES)
def test_quantised_releases(name: str, tmp_path: Path, groups: Any) -> None:
    save_quantised_model("llama3.1", tmp_path, RECIPES[name](), **SHAPE)
    expected, slots = planned(tmp_path)
    assert slots == 1 and held(tmp_path, groups) == pytest.approx(expected, rel=0.02)
    assert planned(tmp_path, weights="expanded")[1] == 0
    assert planned(tmp_path, residency="disk")[1] == 2
    plain = dataclasses.replace(read_architecture(tmp_path), packed_bits=0.0)
    assert make_workload(RunConfig(ModelConfig("", "bfloat16"), [], DataConfig([])), plain, 1).slots == 0


@pytest.mark.parametrize(
    "bits, group, expected", [(4, 64, 4.5), (4, -1, 4), (10**400, 64, 0), (4, 10**400, 4), ("x", 1, 0)]
)
def test_settings_from_a_file(bits: Any, group: Any, expected: float) -> None:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group}
    assert packed_bits({"quantization_config": settings}) == expected


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_plain_releases_that_are_rounded(kind: Any, saved_model: Any, groups: Any) -> None:
    path, _ = saved_model("llama3.1", **SHAPE, dtype="bfloat16")
    expected, slots = planned(path, quantise=kind)
    assert slots == 1 and held(path, groups, kind) == pytest.approx(expected, rel=0.04)
