"""Phases of a run on a machine of round numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_ee.config.load import config_from_dict
from megatron_ee.parallel.costs import attention_flops, final_exit_flops, mlp_flops
from megatron_ee.planning.costs import exit_flops, exit_forward_flops, layer_flops
from megatron_ee.planning.devices import DISK
from megatron_ee.planning.estimate import Estimate, estimate_run
from megatron_ee.planning.machine import Machine
from megatron_ee.planning.parameters import layer_matrices
from megatron_ee.testing.models import llama2_7b

MODEL = llama2_7b()
ROUND = Machine("round", 80e9, 1e14, 5e13, 1e13, 1e12, 1e12, 1e11, 1e10, 1e10, 8, 360.0, ())
WHOLE = sum(attention_flops(MODEL, layer, 2048) + mlp_flops(MODEL, 2048) for layer in range(1, 33))


def estimate(tmp_path: Any, gpus: int = 1, **changes: Any) -> Estimate:
    """Of a run with one exit, on machines of round numbers."""
    values: dict[str, Any] = {
        "model": {"path": str(tmp_path), "dtype": "bfloat16"},
        "exits": [{"layer": 8, "init": "copy"}],
        "data": {"train": ["c"]},
        "tuning": {"steps": 2500, "global_batch_size": 8},
    }
    return estimate_run(config_from_dict({**values, **changes}), MODEL, gpus, ROUND)


def seconds(found: Estimate) -> dict[str, float]:
    """By phase."""
    assert found.run is not None
    return {phase.name: phase.seconds for phase in found.run.phases}


def test_a_plain_run(tmp_path: Any) -> None:
    found = estimate(tmp_path)
    assert found.run is not None and found.step is not None
    phases = seconds(found)
    assert list(phases) == ["hash and load the backbone", "tuning", "saving"]
    assert phases["tuning"] == 2500 * found.step.seconds
    # All is hashed, and eight layers and the embedding are loaded.
    tuned = found.plan.stages[0].memory.frozen
    assert phases["hash and load the backbone"] == pytest.approx((2 * 6_738_415_616 + tuned) / DISK)
    # Two checkpoints are copied meanwhile, and the last is waited for.
    size = found.disk.checkpoint
    assert phases["saving"] == pytest.approx(2 * size / 1e10 + size / DISK)
    assert found.run.resume == pytest.approx((tuned + size) / DISK)
    assert found.kilowatt_hours == pytest.approx(found.run.seconds * 360 / 3.6e6)
    assert found.price(2.5) == pytest.approx(2.5 * found.run.seconds / 3600)


def test_validation_runs_all_layers_once_and_then_those_with_exits(tmp_path: Any) -> None:
    data = {"train": ["c"], "validation": ["v"]}
    none = {"sequences": 64, "acceptance": {"prompts": 0}}
    found = estimate(tmp_path, data=data, validation=none)
    once = (WHOLE + final_exit_flops(MODEL, 2048)) / 1e14
    assert seconds(found)["all layers for validation"] == pytest.approx(64 * once)
    # Before the first step, at 1,000 and 2,000, and after the last step. The deepest layer's MLP is the exit's.
    spec = found.specs[0]
    assert (
        exit_flops(MODEL, spec, 2048) > exit_forward_flops(MODEL, spec, 2048) == (6 * 11008 + 2 * 32000) * 4096 * 2048
    )
    each = sum(layer_flops(MODEL, [spec], 2048)) / 1e14 + exit_forward_flops(MODEL, spec, 2048) / 5e13
    assert seconds(found)["validation"] == pytest.approx(4 * 64 * each, rel=0.15)
    # Each token of a continuation reads all weights.
    with_prompts = estimate(tmp_path, data=data, validation={"sequences": 64})
    reading = seconds(with_prompts)["all layers for validation"] - 64 * once
    assert reading == pytest.approx(64 * 2 * 6_738_415_616 / 1e12)


def test_fit_takes_sums_and_solving(tmp_path: Any) -> None:
    found = estimate(tmp_path, exits=[{"layer": 8}, {"layer": 16}], fit={"tokens": 40_000})
    tokens = 3 * 8 * 2048  # whole global batches
    forward = (WHOLE + final_exit_flops(MODEL, 2048)) / 1e14 / 2048
    sums = 2 * 2 * tokens * 11008 * (11008 + 2 * 4096) / 1e13
    solving = 2 * 3 * (11008**3 / 3 + 4 * 11008**2 * 4096) / 1e12
    assert seconds(found)["fit"] == pytest.approx(tokens * forward + sums + solving, rel=0.1)
    # On two stages with one exit each, sums and solving take half of the time.
    halves = estimate(
        tmp_path,
        2,
        exits=[{"layer": 8}, {"layer": 24}],
        fit={"tokens": 40_000},
        parallel={"pipeline": 2},
    )
    assert seconds(halves)["fit"] == pytest.approx(seconds(found)["fit"] / 2, rel=0.1)


def test_a_quantised_release_is_read_as_it_is_stored(tmp_path: Any) -> None:
    plain = estimate(tmp_path, exits=[{"layer": 8, "init": "copy"}])
    release = estimate_run(plain.config, replace(MODEL, packed_bits=4.0), 1, ROUND)
    # Hashed with all 32 layers; the first 8 are read to tune.
    saved = 40 * layer_matrices(MODEL) * (2 - 0.5)
    assert seconds(plain)["hash and load the backbone"] - seconds(release)["hash and load the backbone"] == (
        pytest.approx(saved / DISK)
    )


def test_fits_that_do_not_fit_together_take_turns(tmp_path: Any) -> None:
    exits = [{"layer": layer, "head": "shared"} for layer in (4, 8, 12, 16, 20, 24)]
    found = estimate(tmp_path, exits=exits)
    assert found.run is not None
    amounts = {phase.name: phase.amount for phase in found.run.phases}
    assert amounts["fit"] == "6 exits, 180,224 tokens"
    small = Machine("small", 24e9, 1e14, 5e13, 1e13, 1e12, 1e12, 1e11, 1e10, 1e10, 8, 360.0, ())
    tight = estimate_run(found.config, MODEL, 1, small)
    assert tight.run is not None
    assert "6 exits, 180,224 tokens in 3 turns" in {phase.amount for phase in tight.run.phases}
    # Streamed and packed layers leave more memory for the fit.
    for way, turns in ({"residency": "host"}, ""), ({"quantise": "int8"}, " in 2 turns"):
        changed = replace(found.config, model=replace(found.config.model, **way))
        run = estimate_run(changed, MODEL, 1, small).run
        assert run is not None and f"6 exits, 180,224 tokens{turns}" in {phase.amount for phase in run.phases}


def test_gates_are_fitted_while_tuning_that_distils(tmp_path: Any) -> None:
    gated: dict[str, Any] = {"exits": [{"layer": 8, "gate": True}], "data": {"train": ["c"], "validation": ["v"]}}
    distils = {"loss": {"distillation": {"kl": 1.0}}, "validation": {"interval": 500}, "checkpoint": {"interval": 750}}
    after, found = estimate(tmp_path, **gated), estimate(tmp_path, **gated, **distils)
    assert found.run is not None
    # After 0, 500, 750, 1,000, 1,500, 2,000, 2,250 and 2,500 steps.
    assert [phase.amount for phase in found.run.phases if phase.name == "gates"] == ["1, 8 times"]
    names = list(seconds(found))
    assert names.index("validation") < names.index("gates") < names.index("saving")
    # After tuning, two adapters share the pass through all layers.
    tokens = 16 * 4096
    each = 3 * 10 * 2 * 4096**2 * tokens / 1e12 + exit_forward_flops(MODEL, found.specs[0], 1) * tokens / 5e13
    assert seconds(after)["gates"] == pytest.approx(seconds(found)["gates"] / 8 + each, rel=1e-6)
    assert found.plan.stages[0].memory.gates == 0 < after.plan.stages[0].memory.gates


def test_gates_are_fitted_after_tuning(tmp_path: Any) -> None:
    found = estimate(tmp_path, exits=[{"layer": 8, "init": "copy", "gate": True}])
    assert list(seconds(found))[-1] == "gates"
    tokens = 16 * 4096
    newton = 3 * 10 * 2 * 4096**2 * tokens / 1e12
    forward = (WHOLE + final_exit_flops(MODEL, 2048)) / 1e14 / 2048 * tokens
    assert seconds(found)["gates"] == pytest.approx(newton + forward, rel=0.1)
    assert found.plan.stages[0].memory.gates > found.plan.stages[0].memory.tuning - 20e9
