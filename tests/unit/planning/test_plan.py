"""The plan: idle time as worked out by hand, and what a configuration and the table make of it."""

from __future__ import annotations

import dataclasses
import io

import pytest

from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.load import config_from_dict
from megatron_ee.exits.fit import fit_bytes
from megatron_ee.exits.gate import newton_bytes
from megatron_ee.parallel.layout import Layout, StageLayout
from megatron_ee.planning.costs import exit_flops, layer_flops
from megatron_ee.planning.memory import gates_memory, stage_memory
from megatron_ee.planning.parameters import trained_parameters
from megatron_ee.planning.plan import StageWork, idle_shares, make_plan, plan_run, schedule_end
from megatron_ee.planning.table import print_plan
from megatron_ee.planning.workload import Workload
from megatron_ee.tables import make_console
from megatron_ee.testing.models import llama2_7b


def layout(*stages: tuple[tuple[int, int] | None, tuple[int, ...]]) -> Layout:
    return Layout(
        tuple(StageLayout(range(0) if ends is None else range(ends[0], ends[1] + 1), exits) for ends, exits in stages)
    )


def test_equal_stages_wait_as_the_formula_says() -> None:
    stages = layout(((1, 1), ()), ((2, 2), ()), ((3, 3), ()), ((4, 4), ()))
    for microbatches in (1, 2, 8):
        shares = idle_shares(stages, [StageWork(5, 0, 0)] * 4, microbatches)
        assert shares == pytest.approx([1 - microbatches / (microbatches + 3)] * 4)


def test_nothing_waits_for_the_exits_of_another_stage() -> None:
    # Forward 2, exits 6: the second stage starts at 2, the third at 4, and each then works without a pause.
    stages = layout(((1, 1), (1,)), ((2, 2), (2,)), ((3, 3), (3,)))
    assert idle_shares(stages, [StageWork(2, 0, 6)] * 3, 5) == pytest.approx([4 / 44] * 3)
    # A stage without layers starts when its last tap is there, at 4 of 4 + 5 x 8.
    stages = layout(((1, 1), (1,)), ((2, 2), ()), (None, (2,)))
    work = [StageWork(2, 0, 6), StageWork(2, 0, 0), StageWork(0, 0, 8)]
    assert idle_shares(stages, work, 5) == pytest.approx([4 / 44, 34 / 44, 4 / 44])
    # The busiest stage in front: those behind it wait at every microbatch.
    stages = layout(((1, 2), (2,)), ((3, 3), (3,)))
    assert idle_shares(stages, [StageWork(4, 0, 6), StageWork(2, 0, 3)], 4) == pytest.approx([0, 20 / 40])


def test_exits_wait_for_their_teacher() -> None:
    # Two layers of 2 each, a final exit of 1 and exits of 3. First stage: forwards 0-2 and 2-4, exits from 5, when the
    # teacher message of the first microbatch is there, to 8, forward to 10, exits to 13, and the last ones to 16.
    stages = layout(((1, 1), (1,)), ((2, 2), ()))
    work = [StageWork(2, 0, 3), StageWork(2, 1, 0)]
    assert idle_shares(stages, work, 3, distillation=True) == pytest.approx([1 / 16, 7 / 16])
    # One microbatch: forward to 2, teacher message at 5, exits to 8.
    assert idle_shares(stages, work, 1, distillation=True) == pytest.approx([3 / 8, 5 / 8])
    # The last stage's own exits need not wait.
    stages = layout(((1, 1), ()), ((2, 2), (2,)))
    assert idle_shares(stages, [StageWork(2, 0, 0), StageWork(2, 1, 3)], 1, distillation=True) == [6 / 8, 2 / 8]


@pytest.mark.parametrize("distillation", [False, True])
def test_steps_of_many_microbatches_are_extrapolated_exactly(
    distillation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = layout(((1, 2), (2,)), ((3, 3), (3,)), ((4, 4), ()))
    work = [StageWork(4, 0, 6), StageWork(2, 0, 3), StageWork(2, 1, 0)]
    ends = [schedule_end(stages, work, 300, distillation=distillation)]
    monkeypatch.setattr("megatron_ee.planning.plan.MOST_SIMULATED", 16)
    ends += [schedule_end(stages, work, count, distillation=distillation) for count in (300, 10**12)]
    assert ends[0] == ends[1] and ends[2] == ends[1] + 10 * (10**12 - 300)


def test_plan_of_a_configuration() -> None:
    values = {
        "model": {"path": "m", "dtype": "bfloat16"},
        "exits": [{"layer": 8}, {"layer": 16, "head": "shared"}],
        "data": {"train": ["c"], "sequence_length": 1024},
        "parallel": {"tensor": 2, "pipeline": 2},
        "tuning": {"global_batch_size": 32, "micro_batch_size": 2},
    }
    specs, model = [ExitSpec(8), ExitSpec(16, "mlp", "shared")], llama2_7b()
    stages = layout(((1, 8), (8,)), ((9, 16), (16,)))
    plan = plan_run(config_from_dict(values), stages, model, specs, world_size=8)
    assert (plan.tensor, plan.data, plan.microbatches, len(plan.stages)) == (2, 2, 8, 2)
    assert [(stage.layers, stage.exits) for stage in plan.stages] == [(range(1, 9), (8,)), (range(9, 17), (16,))]
    workload = Workload(2, tensor=2, data=2, micro_batch_size=2, sequence_length=1024, microbatches=8)
    assert plan == make_plan(stages, model, specs, workload)
    for index, stage in enumerate(plan.stages):
        assert stage.memory == stage_memory(stages, index, model, specs, workload)
    total = sum(layer_flops(model, specs, 1024)) + sum(exit_flops(model, spec, 1024, 2) for spec in specs)
    assert sum(stage.flops for stage in plan.stages) == 16 * total
    assert plan.reference == 8 / 9
    assert plan.efficiency == pytest.approx(1 - sum(stage.idle for stage in plan.stages) / 2)
    values |= {"loss": {"distillation": {"kl": 1.0, "top_k": 4, "temperature": 2.0}}}
    values |= {"optimizer": {"implementation": "deepspeed_cpu"}}
    stages = layout(((1, 8), (8,)), ((9, 32), (16,)))
    taught = plan_run(config_from_dict(values), stages, model, specs, world_size=4)
    workload = dataclasses.replace(workload, data=1, microbatches=16, top_k=4, tempered=True, host_optimizer=True)
    assert taught == make_plan(stages, model, specs, workload)


def test_the_table_shows_every_stage() -> None:
    specs = [ExitSpec(8), ExitSpec(16)]
    stages = layout(((1, 8), (8,)), ((9, 16), ()), (None, (16,)))
    plan = make_plan(stages, llama2_7b(), specs, Workload(2, data=2, microbatches=4))
    file = io.StringIO()
    print_plan(plan, make_console(file))
    lines = file.getvalue().splitlines()
    title, heading, *rows = lines[:5]
    assert title.startswith("Plan: tensor 1 x pipeline 3 x data 2, 4 microbatches per step")
    assert heading.split()[:4] == ["stage", "layers", "exits", "after"]
    assert [row.split()[:3] for row in rows] == [["0", "1-8", "8"], ["1", "9-16", "-"], ["2", "-", "16"]]
    for row, stage in zip(rows, plan.stages, strict=True):
        assert row.split()[-1] == f"{stage.idle:.1%}"
        assert f"{stage.trained_parameters / 1e6:.1f} M" in row
    title, heading, *rows, last = lines[5:]
    assert title.startswith("Memory per rank in GB")
    kinds = "backbone", "exits", "gradients", "optimizer", "activations", "taps", "buffers", "=", "tuning"
    assert heading.split() == ["stage", *kinds]
    for row, stage in zip(rows, plan.stages, strict=True):
        *parts, total = map(float, row.split()[1:])
        assert sum(parts) == pytest.approx(total, abs=0.04)
        assert row.split()[-1] == f"{stage.memory.total / 1e9:.2f}"
    assert last == f"The stages are expected to compute {plan.efficiency:.1%} of the time (M / (M + P - 1): 66.7%)."


def test_the_fit_before_tuning_counts_where_it_needs_more() -> None:
    """All layers and the heads, and one exit's sums, whole while they are solved."""
    model, stages = llama2_7b(), layout(((1, 8), (8,)))
    copied, fitted = (make_plan(stages, model, [ExitSpec(8, init=init)], Workload(2)) for init in ("copy", "fit"))
    (before,), (after,) = (plan.stages for plan in (copied, fitted))
    assert before.memory.fit == 0 and after.memory.tuning == before.memory.tuning == before.memory.total
    weights = 2 * (6_738_415_616 + trained_parameters(model, ExitSpec(8)) + 4096)
    sums, solving = fit_bytes(11008, 4096, 1)
    assert 0 < after.memory.fit - weights - sums - solving < 0.1 * weights
    assert after.memory.total == after.memory.fit > after.memory.tuning
    file = io.StringIO()
    print_plan(fitted, make_console(file))
    heading, row = file.getvalue().splitlines()[4:6]
    assert heading.split()[-4:] == ["=", "tuning", "or", "fit"]
    assert row.split()[-2:] == [f"{after.memory.tuning / 1e9:.2f}", f"{after.memory.fit / 1e9:.2f}"]


def test_validation_and_gates_hold_all_layers() -> None:
    model, stages = llama2_7b(), layout(((1, 8), (8,)))
    (stage,) = make_plan(stages, model, [ExitSpec(8, gate=True)], Workload(2, validates=True)).stages
    (plain,) = make_plan(stages, model, [ExitSpec(8)], Workload(2)).stages
    weights = 2 * 6_738_415_616
    assert 0 < stage.memory.validation - weights < 0.1 * weights
    trained = 2 * (trained_parameters(model, ExitSpec(8)) + 4096)
    assert 0 < stage.memory.gates - weights - 2 * trained < 0.1 * weights  # of two adapters
    assert stage.memory.total == stage.memory.gates > stage.memory.tuning == plain.memory.tuning
    assert plain.memory.validation == plain.memory.gates == 0
    # A stage without the final exit has a copy of a shared head, of each adapter.
    shared, halves = [ExitSpec(8, "norm", "shared", gate=True)], layout(((1, 16), (8,)), ((17, 32), ()))
    once, twice = (gates_memory(halves, 0, model, shared, Workload(2, validates=each)) for each in (False, True))
    assert twice - once == 2 * (32_000 + 1) * 4096
    distils = Workload(2, validates=True, top_k=8)
    (stage,) = make_plan(layout(((1, 32), (8,))), model, [ExitSpec(8, gate=True)], distils).stages
    assert stage.memory.gates == 0 < newton_bytes(4096) <= stage.memory.activations + stage.memory.taps


def test_free_running_threshold_mode_holds_all_layers() -> None:
    """While tuning, or after it."""
    model, specs, cut = llama2_7b(), [ExitSpec(8)], layout(((1, 8), (8,)))
    shared = {"validates": True, "decodes": True}
    (after,) = make_plan(cut, model, specs, Workload(2, **shared)).stages
    every = layout(((1, 32), (8,)))
    (during,) = make_plan(every.up_to(8), model, specs, Workload(2, **shared, free_running=True)).stages
    assert after.layers == during.layers == range(1, 9) and during.kept == range(9, 33)
    weights, trained = 2 * (6_738_415_616 + 4096), 2 * trained_parameters(model, ExitSpec(8))
    cache = 2 * 2 * 32 * 4096 * 2048  # of one sequence: keys and values of 32 layers
    assert 0 < after.memory.decoding - weights - trained - cache < 0.1 * weights
    assert during.memory.frozen == weights and during.memory.decoding == 0
    assert after.memory.frozen < weights / 3 and after.memory.tuning < during.memory.tuning
    assert during.memory.activations + during.memory.taps >= cache
    assert during.flops == after.flops


def test_the_table_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(layout(((1, 8), (8,))), llama2_7b(), [ExitSpec(8)], Workload(2))
    print_plan(plan)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Plan: ")
