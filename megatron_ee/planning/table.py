"""Prints the plan of a run: per stage its content, work and memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ee.planning.devices import GB
from megatron_ee.planning.memory import Memory
from megatron_ee.planning.plan import RunPlan
from megatron_ee.tables import add_columns, counted, make_console, new_table

if TYPE_CHECKING:
    from rich.console import Console


def print_plan(plan: RunPlan, console: Console | None = None) -> None:
    """Print per stage: content, parameters, expected idle time and memory per rank; by default to stderr."""
    console = console or make_console(sys.stderr)
    sizes = f"tensor {plan.tensor} x pipeline {len(plan.stages)} x data {plan.data}"
    table = new_table(f"Plan: {sizes}, {counted(plan.microbatches, 'microbatch', 'microbatches')} per step", console)
    add_columns(table, "stage", "layers", "exits after", words=True)
    add_columns(table, "frozen per rank", "trained per rank", "TFLOP per step", "idle")
    for index, stage in enumerate(plan.stages):
        layers = " + ".join(f"{run[0]}-{run[-1]}" for run in (stage.layers, stage.kept) if run) or "-"
        parameters = (f"{count / 1e6:,.1f} M" for count in (stage.frozen_parameters, stage.trained_parameters))
        work = f"{stage.flops / 1e12:,.3g}", f"{stage.idle:.1%}"
        table.add_row(str(index), layers, _listed(stage.exits), *parameters, *work)
    console.print(table)
    _print_memory(plan, console)
    reference = f"M / (M + P - 1): {plan.reference:.1%}"
    console.print(f"The stages are expected to compute {plan.efficiency:.1%} of the time ({reference}).", markup=False)


def _print_memory(plan: RunPlan, console: Console) -> None:
    table = new_table("Memory per rank in GB; only the largest phase counts", console)
    add_columns(table, "stage", words=True)
    parts = [memory_parts(stage.memory) for stage in plan.stages]
    phases = [memory_phases(stage.memory) for stage in plan.stages]
    used = [name for name in phases[0] if any(each[name] for each in phases)]
    add_columns(table, *parts[0], *(f"= {name}" if name == "tuning" else f"or {name}" for name in used))
    for index, (kinds, totals) in enumerate(zip(parts, phases, strict=True)):
        sizes = (*kinds.values(), *(totals[name] for name in used))
        table.add_row(str(index), *(f"{size / GB:,.2f}" for size in sizes))
    console.print(table)


def memory_parts(memory: Memory) -> dict[str, int]:
    """Bytes while tuning, by kind."""
    return {
        "backbone": memory.frozen,
        "exits": memory.trained,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "taps": memory.taps,
        "buffers": memory.transfer,
    }


def memory_phases(memory: Memory) -> dict[str, int]:
    """Bytes of each phase; 0 where a run has none."""
    return {
        "tuning": memory.tuning,
        "fit": memory.fit,
        "validation": memory.validation,
        "gates": memory.gates,
        "decoding": memory.decoding,
    }


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "-"
