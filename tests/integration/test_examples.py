"""The configurations under ``examples/`` load, suit their models, and fit the GPUs that they name."""

from __future__ import annotations

import pytest

from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import LossConfig, OptimizerConfig, RunConfig, ScheduleConfig
from megatron_ee.planning.balance import resolve_layout
from megatron_ee.planning.plan import RunPlan, plan_run
from megatron_ee.testing.examples import EXAMPLES, MODELS, example_architecture, open_example, written

GPU_BYTES = 80e9

# Of seven exits: three matrices of the MLP, the norm and the head. Four ranks pad a vocabulary of 32,000 to 32,256.
TRAINED = {
    "llama2_7b": 7 * (3 * 4096 * 11008 + 4096 + 32000 * 4096),
    "llama2_13b": 7 * (3 * 5120 * 13824 + 5120 + 32000 * 5120),
    "llama2_70b": 7 * (3 * 8192 * 28672 + 8192 + 32256 * 8192),
    "llama3.1_8b": 7 * (3 * 4096 * 14336 + 4096 + 128256 * 4096),
}


def planned(name: str, processes: int | None = None) -> tuple[RunConfig, tuple[ExitSpec, ...], RunPlan]:
    config, specs, processes = open_example(name, processes=processes)
    architecture = example_architecture(name)
    layout = resolve_layout(config.parallel, specs, architecture, config.data.sequence_length)
    return config, specs, plan_run(config, layout, architecture, specs, processes)


def test_every_configuration_is_checked() -> None:
    assert {path.parent.name for path in EXAMPLES.glob("llama*/*.yaml")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_example(name: str) -> None:
    config, specs, plan = planned(name)
    architecture = example_architecture(name)
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


def test_any_example_scales_by_replicas() -> None:
    for name in MODELS:
        _, specs, plan = planned(name)
        _, same, wider = planned(name, 4 * plan.tensor * len(plan.stages))
        assert same == specs
        for stage, before in zip(wider.stages, plan.stages, strict=True):
            assert stage.memory.optimizer == pytest.approx(before.memory.optimizer / 4, rel=1e-6)
            assert stage.memory.tuning < before.memory.tuning
