"""Prints the plan as a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ee.planning.plan import RunPlan, StagePlan
from megatron_ee.tables import add_columns, make_console, new_table

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30


def print_plan(plan: RunPlan, console: Console | None = None) -> None:
    """Print per stage: content, parameters, memory per rank and expected idle time; by default to stderr."""
    console = console or make_console(sys.stderr)
    sizes = f"tensor {plan.tensor} x pipeline {len(plan.stages)} x data {plan.data}"
    table = new_table(f"Plan: {sizes}, {plan.microbatches} microbatches per step; parameters and GiB per rank", console)
    add_columns(table, "stage", "layers", "exits after", words=True)
    add_columns(table, "frozen", "trained", "TFLOP per step", "idle")
    add_columns(table, "weights", "gradients", "optimizer", "activations", "transfer")
    fitted = any(stage.memory.fit for stage in plan.stages)
    if fitted:
        add_columns(table, "or fit before")
    add_columns(table, "total")
    for index, stage in enumerate(plan.stages):
        table.add_row(str(index), *_row(stage, fitted))
    console.print(table)
    reference = f"M / (M + P - 1): {plan.reference:.1%}"
    console.print(f"The stages are expected to compute {plan.efficiency:.1%} of the time ({reference}).", markup=False)


def _row(stage: StagePlan, fitted: bool) -> list[str]:
    layers = f"{stage.layers[0]}-{stage.layers[-1]}" if stage.layers else "-"
    memory = stage.memory
    parts = (memory.frozen + memory.trained, memory.gradients, memory.optimizer, memory.activations, memory.transfer)
    return [
        layers,
        _listed(stage.exits),
        f"{stage.frozen_parameters / 1e6:,.1f} M",
        f"{stage.trained_parameters / 1e6:,.1f} M",
        f"{stage.flops / 1e12:,.3g}",
        f"{stage.idle:.1%}",
        *(f"{size / GIB:,.2f}" for size in (*parts, *([memory.fit] if fitted else []), memory.total)),
    ]


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "-"
