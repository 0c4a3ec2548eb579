"""The tuning step with layers streamed from host memory or disk: time that waits for them, and memory against plan."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import AddOption, Result, median_of, run
from benchmarks.models import describe_model, model_directory
from benchmarks.processes import Side
from megatron_ee.commands import DTYPES, RESIDENCIES, at_least

DESCRIPTION = """Tune two mlp exits with the shared head, after half of the layers and after all of them, with layers on
the device or streamed. Each residency has a process of its own; they take turns. Not hidden is the share of a step in
which it waits for a layer. Peak is the device's memory, or on a CPU the process's without Python and torch."""
COLUMNS = (
    ("residency", "residency", ""),
    ("step_seconds", "s/step", ",.2f"),
    ("tokens_per_second", "tokens/s", ",.1f"),
    ("not_hidden", "not hidden", ".1%"),
    ("reading", "reading", ".1%"),
    ("read_mb_per_second", "read MB/s", ",.0f"),
    ("copy_mb_per_second", "copied MB/s", ",.0f"),
    ("peak_mb", "peak MB", ",.0f"),
    ("planned_mb", "planned MB", ",.0f"),
)


def add_options(add: AddOption) -> None:
    """This benchmark's own."""
    count = at_least(1)
    add("--residency", "that are compared", choices=RESIDENCIES, nargs="+", default=list(RESIDENCIES))
    add("--tokens", "tokens of a microbatch", type=at_least(2), default=256, metavar="N")
    add("--microbatches", "of a step", type=count, default=4, metavar="N")
    add("--dtype", "of the computation", choices=DTYPES, default="float32")
    add("--file-dtype", "of the random model's files", choices=DTYPES, default="bfloat16")
    add("--cold", "drop the model's files from the page cache before each step", action="store_true")
    add("--plot", "write the timeline of the last step of the last residency to this file", type=Path, metavar="FILE")


def measure(options: argparse.Namespace, directory: Path) -> Result:
    """Compare, in turns."""
    model = model_directory(options, directory, options.file_dtype)
    described = describe_model(options, model)
    exits = sorted({max(1, described["layers"] // 2), described["layers"]})
    settings = {
        "directory": str(model),
        "exits": exits,
        **{name: getattr(options, name) for name in ("dtype", "tokens", "microbatches", "cold")},
    }
    plot = None if options.plot is None else str(options.plot.absolute())
    with ExitStack() as stack:
        sides = {
            residency: stack.enter_context(Side("streamed", {"residency": residency, "plot": plot, **settings}))
            for residency in options.residency
        }
        found: dict[str, list[dict[str, Any]]] = {residency: [] for residency in sides}
        for number in range(1 + options.repeats):  # the first step allocates
            for residency, side in sides.items():
                step = side.call("step")
                found[residency] += [step] if number else []
        if options.plot is not None:
            sides[options.residency[-1]].call("plot")
        memory = {residency: side.call("memory") for residency, side in sides.items()}
        nbytes = next(iter(sides.values())).call("layer_bytes")
    losses = [steps[-1]["losses"] for steps in found.values()]
    if any(each != losses[0] for each in losses):
        raise RuntimeError(f"the residencies do not compute the same: {losses}")
    rows = [_row(residency, steps, memory[residency], nbytes, options) for residency, steps in found.items()]
    described |= settings
    return Result("Streamed layers", described, COLUMNS, {"layer_gigabytes_per_step": nbytes / 1e9}, rows)


def _row(
    residency: str, steps: list[dict[str, Any]], memory: dict[str, int], nbytes: int, options: argparse.Namespace
) -> dict[str, Any]:
    elapsed, read, copied = (median_of(steps, key) for key in ("seconds", "read", "copy"))
    return {
        "residency": residency,
        "step_seconds": elapsed,
        "tokens_per_second": options.microbatches * options.tokens / elapsed,
        "not_hidden": median_of(steps, "wait") / elapsed,
        "reading": read / elapsed,
        "read_mb_per_second": nbytes / read / 1e6 if read else None,
        "copy_mb_per_second": nbytes / copied / 1e6 if copied else None,
        "peak_mb": memory["peak"] / 1e6,
        "planned_mb": memory["planned"] / 1e6,
        "steps": steps,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return run("streamed", DESCRIPTION, add_options, measure, argv, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
