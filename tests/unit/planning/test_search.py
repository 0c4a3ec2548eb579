"""The search: what it compares, what it prefers, and why the rest does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.load import config_from_dict, load_config
from megatron_ee.config.schema import RunConfig
from megatron_ee.planning.devices import DEVICES, HOST_RESERVED
from megatron_ee.planning.estimate import estimate_run
from megatron_ee.planning.machine import assumed_machine
from megatron_ee.planning.parameters import layer_parameters
from megatron_ee.planning.search import KINDS, Limits, Search, apply_changes, quantised_layers, search
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


def searched(run: RunConfig, gpus: int, gpu: str, host: float | None = None, model: Architecture = MODEL) -> Search:
    device = DEVICES[gpu]
    return search(run, model, gpus, Limits(device.memory, host), assumed_machine(device, "bfloat16"))


def layers(found: Search) -> list[str]:
    """Of the best: where the layers are, or how they are quantised."""
    models = [each.estimate.config.model for each in found.best]
    return [model.residency if model.quantise == "none" else model.quantise for model in models]


def test_the_best_are_the_fastest_that_fit(tmp_path: Any) -> None:
    run = config(tmp_path)
    found = searched(run, 4, "h100")
    assert len(found.best) == 3
    times = [each.estimate.step.seconds for each in found.best if each.estimate.step is not None]
    assert times == sorted(times) and len(times) == 3
    assert all(each.estimate.needed <= 80e9 and each.same_result for each in found.best)
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
    found = search(run, MODEL, 2, Limits(30e9), None)
    assert [each.arguments for each in found.best][0][:2] == ["--parallel.tensor", "1"]
    for each in found.best:
        changed = load_config(tmp_path / "run.yaml", each.arguments)
        again = estimate_run(changed, MODEL, 2, None)
        assert (again.plan, again.workload) == (each.estimate.plan, each.estimate.workload)
        assert again.needed == each.estimate.needed <= 30e9


def test_what_does_not_fit_says_what_takes_the_memory(tmp_path: Any) -> None:
    run = config(tmp_path)
    found = searched(run, 1, "rtx4090")
    (misfit,) = found.misfits
    assert (misfit.tensor, misfit.pipeline) == (1, 1)
    least = apply_changes(run, {"tuning.micro_batch_size": 1})
    assert misfit.short == pytest.approx(estimate_run(least, MODEL, 1, None).needed - 24e9)
    assert misfit.reason == f"the 7 exit bodies take {7 * (3 * 4096 * 11008 + 4096) * 16 / 1e9:.1f} GB"
    # No single change helps, but two do.
    shared = {f"exits.{index}.head": "shared" for index in range(7)}
    assert misfit.remedy == {**shared, "model.residency": "host"}
    changed = apply_changes(least, misfit.remedy)
    assert estimate_run(changed, MODEL, 1, None).needed <= 24e9
    # The search found the same, and the same from disk, which is slower, and from quantised layers on the device.
    assert layers(found)[:2] == ["host", "disk"]
    assert all(each.less and each.changes.items() >= shared.items() for each in found.best)


def test_what_trains_less_is_offered_last(tmp_path: Any) -> None:
    found = searched(config(tmp_path, exits=[{"layer": 8}, {"layer": 16}, {"layer": 24}]), 1, "rtx4090")
    assert [each.less for each in found.best] == [False, False, True] and layers(found) == ["host", "disk", "device"]
    (misfit,) = found.misfits
    assert misfit.remedy == {f"exits.{index}.head": "shared" for index in range(3)} and misfit.short > 0


def test_without_a_device_less_work_for_the_busiest_stage_is_better(tmp_path: Any) -> None:
    found = search(config(tmp_path), MODEL, 4, Limits(80e9), None)
    assert [each.estimate.step for each in found.best] == [None] * 3
    assert found.best[0].estimate.workload.data == 4


def test_sizes_that_divide_nothing(tmp_path: Any) -> None:
    """Twelve replicas do not divide a batch of sixteen; three tensor-parallel ranks do not divide the heads."""
    found = searched(config(tmp_path), 12, "h100")
    reasons = {(each.tensor, each.pipeline): each.reason for each in found.misfits}
    assert reasons[1, 1] == "12 data-parallel replicas do not divide tuning.global_batch_size 16"
    assert not any(tensor == 3 for tensor, _ in reasons)
    assert all(each.estimate.workload.data in (1, 2, 4) for each in found.best)


SHARED = [{"layer": layer, "head": "shared", "init": "copy"} for layer in (8, 16, 24)]


def test_layers_are_quantised_only_where_too_little_fits_without(tmp_path: Path) -> None:
    """On 16 GB the layers have to be streamed. Quantised ones come after these, and say what they change."""
    run = config(tmp_path, exits=SHARED, data={"train": ["c"]})
    machine = assumed_machine(DEVICES["rtx4090"], "bfloat16")
    found = search(run, MODEL, 1, Limits(16e9), machine)
    assert layers(found) == ["host", "disk", "int8"]
    assert [each.rounded for each in found.best] == ["", "", "int8"] and not any(each.less for each in found.best)
    assert found.best[2].changes["model.quantise"] == "int8"
    # Less memory leaves only four bits, and enough memory none.
    assert layers(search(run, MODEL, 1, Limits(13e9), machine)) == ["host", "disk", "int4"]
    assert layers(search(run, MODEL, 1, Limits(40e9), machine)) == ["device", "host", "disk"]


def test_quantised_layers_are_named_as_a_remedy(tmp_path: Path) -> None:
    """Two pipeline stages cannot stream, and there is little else that takes memory."""
    run = config(
        tmp_path, exits=[{"layer": 24, "body": "norm", "head": "shared", "init": "copy"}], data={"train": ["c"]}
    )
    found = search(run, MODEL, 2, Limits(6e9), assumed_machine(DEVICES["rtx4090"], "bfloat16"))
    remedies = {(each.tensor, each.pipeline): each.remedy or {} for each in found.misfits}
    assert remedies[1, 2]["model.quantise"] == "int8" and "model.quantise" not in remedies[1, 1]


def test_quantised_releases_are_searched_packed_and_expanded(tmp_path: Path) -> None:
    release = dataclasses.replace(MODEL, packed_bits=4.25)
    run = config(tmp_path, exits=SHARED, data={"train": ["c"]})
    found = searched(run, 1, "h100", model=release)
    # Expanded weights, on the device or on the host, take no time to expand. They have the same values.
    assert [each.changes for each in found.best] == [{"model.residency": "host"}, {"model.weights": "expanded"}, {}]
    assert all(each.same_result for each in found.best)
    assert quantised_layers(run, release) == []
    expanded = apply_changes(run, {"model.weights": "expanded"})
    small = search(expanded, release, 1, Limits(13e9), assumed_machine(DEVICES["rtx4090"], "bfloat16"))
    (packed,) = (each for each in small.best if each.estimate.workload.residency == "device")
    assert packed.changes == {"model.weights": "packed"}


def test_what_is_quantised_already_can_be_quantised_more(tmp_path: Path) -> None:
    def kinds(written: str, model: Architecture = MODEL) -> list[str]:
        run = config(tmp_path, model={"path": str(tmp_path), "dtype": "bfloat16", "quantise": written})
        return [each["model.quantise"] for each in quantised_layers(run, model)]

    assert [kinds(each) for each in KINDS] == [["int8", "int4"], ["int4"], []]
    assert kinds("none", dataclasses.replace(MODEL, ffn_size=11000)) == ["int8"], "no group divides 11,000"


def test_layers_in_host_memory_need_a_host_that_holds_them(tmp_path: Path) -> None:
    run = config(tmp_path, exits=SHARED[:2])
    limits = {"model.residency": "host"}
    needed = estimate_run(apply_changes(run, limits), MODEL, 1, None).host_needed
    assert needed > 32 * 2 * layer_parameters(MODEL)
    machine = assumed_machine(DEVICES["rtx4090"], "bfloat16")
    enough, short = (search(run, MODEL, 1, Limits(11e9, host), machine) for host in (needed, needed - 1))
    assert "host" in layers(enough) and "host" not in layers(short) and "disk" in layers(short)
    assert [each.misfits[0].remedy for each in (enough, short)] == [limits, {"model.residency": "disk"}]
    # Processes of one machine share its memory.
    both = estimate_run(apply_changes(run, {**limits, "tuning.micro_batch_size": 1}), MODEL, 2, machine)
    assert both.host_needed == pytest.approx(both.host.total + 2 * HOST_RESERVED)
    many = estimate_run(apply_changes(run, {**limits, "tuning.micro_batch_size": 1}), MODEL, 16, machine)
    assert many.host_needed == pytest.approx(many.host.total / 2 + 8 * HOST_RESERVED)


def test_a_host_without_room_for_the_optimizer_or_checkpoints(tmp_path: Path) -> None:
    on_host = {"implementation": "deepspeed_cpu"}
    run = config(tmp_path, optimizer=on_host)
    estimate = estimate_run(run, MODEL, 1, None)
    short = searched(run, 1, "h100", host=estimate.host_needed - 10e9)
    (misfit,) = short.misfits
    assert misfit.host and misfit.short == pytest.approx(10e9)
    assert misfit.reason == f"the optimizer's state takes {estimate.host.optimizer / 1e9:.1f} GB"
    assert misfit.remedy == {"checkpoint.asynchronous": False}
    run = config(tmp_path)
    estimate = estimate_run(run, MODEL, 1, None)
    (misfit,) = searched(run, 1, "h100", host=estimate.host_needed - 1).misfits
    assert misfit.reason == f"the copy of a checkpoint takes {estimate.host.checkpoint / 1e9:.1f} GB"
    assert searched(run, 1, "h100", host=estimate.host_needed).misfits == ()


def test_a_cpu_has_one_memory_for_everything(tmp_path: Path) -> None:
    """Layers in host memory do not leave its device's memory."""
    cpu = dataclasses.replace(assumed_machine(DEVICES["rtx4090"], "bfloat16"), accelerator=False)
    run = config(tmp_path, exits=SHARED, data={"train": ["c"]})
    found = search(run, MODEL, 1, Limits(16e9), cpu)
    assert layers(found) == ["disk"]


@pytest.mark.slow
def test_an_absurd_number_of_gpus_ends_at_once(tmp_path: Any) -> None:
    run = config(tmp_path, tuning={"global_batch_size": 10**12})
    found = searched(run, 10**12, "h100")
    assert [each.estimate.gpus for each in found.best] == [10**12] * 3
