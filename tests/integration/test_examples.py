"""The configurations under ``examples/`` load, suit their models, and fit the GPUs that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.config.architecture import Architecture, parse_architecture
from megatron_ee.config.check import check_run
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.load import load_config
from megatron_ee.config.schema import LossConfig, OptimizerConfig, RunConfig, ScheduleConfig
from megatron_ee.parallel.balance import resolve_layout
from megatron_ee.parallel.plan import Plan, plan_run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GPU_BYTES = 80e9

# What the released config.json files say.
LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5}
LLAMA2 = {**LLAMA, "vocab_size": 32000, "max_position_embeddings": 4096}
MODELS: dict[str, dict[str, Any]] = {
    "llama2_7b": {
        **LLAMA2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama2_13b": {
        **LLAMA2,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "llama2_70b": {
        **LLAMA2,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama3.1_8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
}
# Of seven exits: three matrices of the MLP, the norm and the head. Four ranks pad a vocabulary of 32,000 to 32,256.
TRAINED = {
    "llama2_7b": 7 * (3 * 4096 * 11008 + 4096 + 32000 * 4096),
    "llama2_13b": 7 * (3 * 5120 * 13824 + 5120 + 32000 * 5120),
    "llama2_70b": 7 * (3 * 8192 * 28672 + 8192 + 32256 * 8192),
    "llama3.1_8b": 7 * (3 * 4096 * 14336 + 4096 + 128256 * 4096),
}


def open_example(name: str, model_path: Path) -> tuple[RunConfig, Architecture, tuple[ExitSpec, ...], Plan]:
    config = load_config(EXAMPLES / name / "config.yaml", ["--model.path", str(model_path)])
    architecture, processes = parse_architecture(MODELS[name]), int(written(name, r"--nproc-per-node (\d+)"))
    specs = check_run(config, architecture, processes)
    layout = resolve_layout(config.parallel, specs, architecture, config.data.sequence_length)
    return config, architecture, specs, plan_run(config, layout, architecture, specs, processes)


def written(name: str, pattern: str) -> str:
    """What the file's comments say."""
    found = re.search(pattern, (EXAMPLES / name / "config.yaml").read_text(encoding="utf-8"))
    assert found is not None, pattern
    return found[1]


def test_every_configuration_is_checked() -> None:
    assert {path.parent.name for path in EXAMPLES.glob("llama*/*.yaml")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_example(name: str, tmp_path: Path) -> None:
    config, architecture, specs, plan = open_example(name, tmp_path)
    eighth = architecture.num_layers // 8
    assert [(spec.layer, spec.body, spec.head) for spec in specs] == [(eighth * n, "mlp", "own") for n in range(1, 8)]
    # The paper's, written out in the file, are also the defaults.
    assert config.optimizer == OptimizerConfig()
    assert config.schedule == ScheduleConfig()
    assert config.loss == LossConfig()
    assert (config.tuning.steps, config.tuning.global_batch_size, config.data.sequence_length) == (40_000, 16, 2048)

    assert plan.data == 1
    assert [layer for stage in plan.stages for layer in stage.layers] == [*range(1, 7 * eighth + 1)]
    assert sorted(layer for stage in plan.stages for layer in stage.exits) == [spec.layer for spec in specs]
    peak = max(stage.memory.total for stage in plan.stages)
    assert peak < GPU_BYTES
    assert int(written(name, r"About (\d+) GB per GPU")) == pytest.approx(peak / 1e9, abs=0.6)
    # Norms are on each tensor-parallel rank, everything else is on one.
    norms = 7 * architecture.hidden_size * (plan.tensor - 1)
    assert sum(stage.trained_parameters for stage in plan.stages) * plan.tensor == TRAINED[name] + norms
    # Balanced: no stage has a tenth more than its share.
    work = [stage.flops for stage in plan.stages]
    assert max(work) < 1.1 * sum(work) / len(work)
    assert plan.efficiency > 0.9 * plan.reference


def test_any_example_scales_by_replicas(tmp_path: Path) -> None:
    for name in MODELS:
        config, architecture, specs, plan = open_example(name, tmp_path)
        layout = resolve_layout(config.parallel, specs, architecture, config.data.sequence_length)
        processes = 4 * plan.tensor * len(plan.stages)
        assert check_run(config, architecture, processes) == specs
        wider = plan_run(config, layout, architecture, specs, processes)
        for stage, before in zip(wider.stages, plan.stages, strict=True):
            assert stage.memory.optimizer == pytest.approx(before.memory.optimizer / 4, rel=1e-6)
            assert stage.memory.total < before.memory.total
