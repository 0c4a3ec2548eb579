"""Time of a step on a machine of round numbers, worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ee.config.exits import ExitSpec
from megatron_ee.parallel.layout import Layout, StageLayout
from megatron_ee.planning.costs import exit_flops, layer_flops
from megatron_ee.planning.devices import DEVICES, DISK, HOST_BANDWIDTH
from megatron_ee.planning.machine import Machine, assumed_machine, group_link
from megatron_ee.planning.parameters import layer_matrices, layer_parameters, stage_parameters, trained_parameters
from megatron_ee.planning.step_time import EXPANSION, step_time, streaming_seconds, update_bytes
from megatron_ee.planning.workload import Workload
from megatron_ee.testing.models import llama2_7b

MODEL = llama2_7b()
SPECS = (ExitSpec(4), ExitSpec(8))
ONE = Layout((StageLayout(range(1, 9), (4, 8)),))
ROUND = Machine("round", 80e9, 1e14, 5e13, 1e13, 1e12, 1e12, 1e11, 1e10, 1e10, 8, 100.0, ())
COUNT = sum(trained_parameters(MODEL, spec) for spec in SPECS)


def test_one_device() -> None:
    workload = Workload(2, microbatches=4)
    found = step_time(ONE, MODEL, SPECS, workload, ROUND)
    (stage,) = found.stages
    assert stage.layers == pytest.approx(4 * sum(layer_flops(MODEL, SPECS, 2048)) / 1e14)
    assert stage.exits == pytest.approx(4 * sum(exit_flops(MODEL, spec, 2048) for spec in SPECS) / 5e13)
    # Gradients thrice and once more, then AdamW: 4 read, and weight, remainder and moments read and written.
    assert update_bytes(COUNT, workload) == COUNT * (16 + 4 + 2 * (2 + 2 + 8))
    assert stage.update == pytest.approx(update_bytes(COUNT, workload) / 1e12)
    assert stage.tensor == stage.gradients == 0
    assert found.seconds == pytest.approx(stage.layers + stage.exits + stage.update)


def test_few_tokens_take_as_long_as_reading_the_weights() -> None:
    workload = Workload(2, sequence_length=8)
    frozen, _ = stage_parameters(ONE, 0, MODEL, SPECS)
    assert step_time(ONE, MODEL, SPECS, workload, ROUND).stages[0].layers == pytest.approx(2 * frozen / 1e12)


def test_links() -> None:
    """Tensor-parallel reductions stop the work; of gradients only the last exit's are waited for."""
    workload = Workload(2, tensor=2, data=4, microbatches=4)
    (stage,) = step_time(ONE, MODEL, SPECS, workload, ROUND).stages
    hidden, halves = 2048 * 4096 * 2, [trained_parameters(MODEL, spec, 2) for spec in SPECS]
    assert stage.tensor == pytest.approx(4 * (2 * 8 + 2 * 2) * hidden / 1e11)
    assert stage.gradients == pytest.approx((3 / 4 * 4 * halves[1] + 3 / 4 * 2 * sum(halves)) / 1e11)
    # Ranks are numbered tensor-parallel first: groups beyond one machine use the network.
    assert [group_link(ROUND, *sizes) for sizes in ((2, 1), (8, 1), (4, 2), (4, 4))] == [1e11, 1e11, 1e11, 1e10]


def test_stages_overlap_and_wait_for_messages() -> None:
    """Two equal stages of one microbatch each: the second starts when h has arrived."""
    specs = (ExitSpec(8, "norm", "shared"),)
    work = [layer_flops(MODEL, specs, 2048)[0] * 4 / 1e14] * 2
    stages = Layout((StageLayout(range(1, 5)), StageLayout(range(5, 9), (8,))))
    found = step_time(stages, MODEL, specs, Workload(2), ROUND)
    exits = exit_flops(MODEL, specs[0], 2048) / 5e13
    message = 2048 * 4096 * 2 / 1e11
    assert found.seconds == pytest.approx(sum(work) + message + exits + found.stages[1].update)


def test_streamed_layers_are_read_once_per_step_under_the_work() -> None:
    """Tokens enough hide the reading. All ranks of a machine share its storage."""
    layers = 8 * layer_parameters(MODEL) * 2
    resident = step_time(ONE, MODEL, SPECS, Workload(2, microbatches=4), ROUND).seconds
    (stage,) = step_time(ONE, MODEL, SPECS, Workload(2), ROUND).stages
    host = Workload(2, residency="host", slots=2)
    assert streaming_seconds(8, MODEL, host, ROUND) == pytest.approx(layers / 1e10)
    assert step_time(ONE, MODEL, SPECS, host, ROUND).seconds == pytest.approx(layers / 1e10 + stage.update)
    many = dataclasses.replace(host, microbatches=4)
    assert step_time(ONE, MODEL, SPECS, many, ROUND).seconds == pytest.approx(resident)
    disk = Workload(2, residency="disk", slots=2, data=4)
    assert streaming_seconds(8, MODEL, disk, ROUND) == pytest.approx(4 * layers / DISK)
    assert streaming_seconds(8, MODEL, Workload(2), ROUND) == 0
    # A quantised release has smaller files. It crosses the link expanded.
    release = dataclasses.replace(MODEL, packed_bits=4.0)
    kept = 2 * (layer_parameters(MODEL) - layer_matrices(MODEL))
    assert streaming_seconds(1, release, disk, ROUND) == pytest.approx(4 * (layer_matrices(MODEL) / 2 + kept) / DISK)
    assert streaming_seconds(8, release, host, ROUND) == streaming_seconds(8, MODEL, host, ROUND)


def test_an_optimizer_in_host_memory_crosses_its_link() -> None:
    """Gradients are copied beside the work that follows; weights are sent beside the update of others."""
    device = step_time(ONE, MODEL, SPECS, Workload(2), ROUND).stages[0]
    host = step_time(ONE, MODEL, SPECS, Workload(2, host_optimizer=True), ROUND).stages[0]
    update = COUNT * (16 / 1e12 + 28 / HOST_BANDWIDTH)
    copy = 4 * COUNT / 2 / 1e10  # of one of two equal exits
    work = exit_flops(MODEL, SPECS[1], 2048) / 5e13
    assert work < copy
    assert host.update == pytest.approx(update + 2 * copy - work)
    assert host.update > device.update and host.exits == device.exits
    # On streamed layers more work follows the first exit: all microbatches pass the next four layers.
    streamed = Workload(2, host_optimizer=True, microbatches=4, residency="host", slots=2)
    assert step_time(ONE, MODEL, SPECS, streamed, ROUND).stages[0].update == pytest.approx(update + copy)
    # A CPU does one after the other.
    cpu = dataclasses.replace(ROUND, accelerator=False)
    assert step_time(ONE, MODEL, SPECS, streamed, cpu).stages[0].update == pytest.approx(update + 2 * copy)


def test_packed_layers_are_expanded_once_per_step_or_microbatch() -> None:
    plain, packed = Workload(2, microbatches=4), Workload(2, microbatches=4, packed_bits=8.0, slots=1)
    layer = layer_matrices(MODEL) * EXPANSION / 1e12

    def added(layout: Layout) -> list[float]:
        stages = (step_time(layout, MODEL, SPECS, workload, ROUND).stages for workload in (plain, packed))
        return [more.layers - less.layers for less, more in zip(*stages, strict=True)]

    assert added(ONE) == [pytest.approx(8 * layer)]
    two = Layout((StageLayout(range(1, 5), (4,)), StageLayout(range(5, 9), (8,))))
    assert added(two) == [pytest.approx(4 * 4 * layer)] * 2


def test_assumed_shares_of_a_data_sheet() -> None:
    h100 = DEVICES["h100"]
    assert (h100.memory, h100.bfloat16, h100.bandwidth) == (80e9, 989e12, 3350e9)
    machine = assumed_machine(h100, "bfloat16")
    assert machine.layers == machine.exits == pytest.approx(0.45 * 989e12)
    assert machine.bandwidth == pytest.approx(0.8 * 3350e9) and machine.link == pytest.approx(0.7 * 450e9)
    # torch multiplies float32 without tensor cores.
    wide = assumed_machine(h100, "float32")
    assert wide.layers == wide.float32 == pytest.approx(0.45 * 67e12)
    assert dataclasses.replace(wide, layers=machine.layers, exits=machine.exits, basis=machine.basis) == machine
    assert "45% of 989 TFLOPS in bfloat16" in machine.basis[0] and "none of it was measured" in machine.basis[0]
