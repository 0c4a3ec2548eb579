"""The search: what it compares, what it prefers, and why the rest does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ee.config.load import config_from_dict, load_config
from megatron_ee.config.schema import RunConfig
from megatron_ee.planning.devices import DEVICES, memory_needed
from megatron_ee.planning.estimate import estimate_run
from megatron_ee.planning.machine import assumed_machine
from megatron_ee.planning.search import Search, apply_changes, search
from megatron_ee.testing.models import llama2_7b

MODEL = llama2_7b()


def config(tmp_path: Any, **changes: Any) -> RunConfig:
    """Seven exits, as in the example."""
    values: dict[str, Any] = {
        "model": {"path": str(tmp_path), "dtype": "bfloat16"},
        "exits": [{"layer": layer} for layer in range(4, 32, 4)],
        "data": {"train": ["c"], "validation": ["v"]},
        "tuning": {"micro_batch_size": 4},
    }
    return config_from_dict({**values, **changes})


def searched(run: RunConfig, gpus: int, gpu: str) -> Search:
    device = DEVICES[gpu]
    return search(run, MODEL, gpus, device.memory, assumed_machine(device, "bfloat16"))


def test_the_best_are_the_fastest_that_fit(tmp_path: Any) -> None:
    run = config(tmp_path)
    found = searched(run, 4, "h100")
    assert len(found.best) == 3
    times = [each.estimate.step.seconds for each in found.best if each.estimate.step is not None]
    assert times == sorted(times) and len(times) == 3
    assert all(each.needed <= 80e9 and not each.less for each in found.best)
    # Replicas send only gradients, so four of them are the fastest.
    assert found.best[0].changes == {} and found.best[0].estimate.workload.data == 4
    assert found.misfits == ()


def test_arguments_give_the_estimated_run(tmp_path: Any) -> None:
    """What is printed, put on the command line of ``tune``, is what was estimated."""
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tmp_path}, dtype: bfloat16}}\nexits: [{{layer: 8}}, {{layer: 16}}]\n"
        "data: {train: [c], validation: [v]}\nparallel: {tensor: 2, sequence: true}\n"
    )
    run = load_config(tmp_path / "run.yaml")
    found = search(run, MODEL, 2, 30e9, None)
    assert [each.arguments for each in found.best][0][:2] == ["--parallel.tensor", "1"]
    for each in found.best:
        changed = load_config(tmp_path / "run.yaml", each.arguments)
        again = estimate_run(changed, MODEL, 2, None)
        assert (again.plan, again.workload) == (each.estimate.plan, each.estimate.workload)
        assert memory_needed(again.memory) == each.needed


def test_what_does_not_fit_says_what_takes_the_memory(tmp_path: Any) -> None:
    run = config(tmp_path)
    found = searched(run, 1, "rtx4090")
    (misfit,) = found.misfits
    assert (misfit.tensor, misfit.pipeline) == (1, 1)
    least = apply_changes(run, {"tuning.micro_batch_size": 1})
    assert misfit.short == pytest.approx(memory_needed(estimate_run(least, MODEL, 1, None).memory) - 24e9)
    assert misfit.reason == f"the 7 exit bodies take {7 * (3 * 4096 * 11008 + 4096) * 16 / 1e9:.1f} GB"
    # No single change helps, but two do.
    shared = {f"exits.{index}.head": "shared" for index in range(7)}
    assert misfit.remedy == {**shared, "model.residency": "host"}
    changed = apply_changes(least, misfit.remedy)
    assert memory_needed(estimate_run(changed, MODEL, 1, None).memory) <= 24e9
    # The search found the same, and the same from disk, which is slower.
    assert [each.estimate.workload.residency for each in found.best] == ["host", "disk"]
    assert all(each.less and each.changes.items() >= shared.items() for each in found.best)


def test_what_trains_less_is_offered_last(tmp_path: Any) -> None:
    found = searched(config(tmp_path, exits=[{"layer": 8}, {"layer": 16}, {"layer": 24}]), 1, "rtx4090")
    kinds = [(each.less, each.estimate.workload.residency) for each in found.best]
    assert kinds == [(False, "host"), (False, "disk"), (True, "device")]
    (misfit,) = found.misfits
    assert misfit.remedy == {f"exits.{index}.head": "shared" for index in range(3)} and misfit.short > 0


def test_without_a_device_less_work_for_the_busiest_stage_is_better(tmp_path: Any) -> None:
    found = search(config(tmp_path), MODEL, 4, 80e9, None)
    assert [each.estimate.step for each in found.best] == [None] * 3
    assert found.best[0].estimate.workload.data == 4


def test_sizes_that_divide_nothing(tmp_path: Any) -> None:
    """Twelve replicas do not divide a batch of sixteen; three tensor-parallel ranks do not divide the heads."""
    found = searched(config(tmp_path), 12, "h100")
    reasons = {(each.tensor, each.pipeline): each.reason for each in found.misfits}
    assert reasons[1, 1] == "12 data-parallel replicas do not divide tuning.global_batch_size 16"
    assert not any(tensor == 3 for tensor, _ in reasons)
    assert all(each.estimate.workload.data in (1, 2, 4) for each in found.best)
