"""The tuning step with packed layers: memory and time against resident ones, and exits that change between them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import AddOption, Result, median_of, run
from benchmarks.models import describe_model, exit_layers, model_directory
from benchmarks.processes import Side
from megatron_ee.commands import DTYPES, QUANTISE, at_least

DESCRIPTION = """Tune mlp exits with the shared head on some text, with all layers plain, or rounded to int8 or int4 and
packed. Each kind has a process of its own; they take turns. The backbone's memory includes the slot that a layer is
expanded into, and the embedding, which is not quantised. Agreement is the share of held-out tokens whose top-1 token
is the final exit's: of exits that were tuned on the same weights, of those tuned here but used on the plain weights,
and of those tuned on the plain weights but used here."""
COLUMNS = (
    ("weights", "weights", ""),
    ("backbone_mb", "backbone MB", ",.1f"),
    ("memory", "memory", ".2fx"),
    ("step_seconds", "s/step", ",.2f"),
    ("time", "time", ".2fx"),
    ("agreement", "agreement", ".1%"),
    ("on_plain", "used on plain", ".1%"),
    ("of_plain", "plain's, used here", ".1%"),
)
PLAIN = "none"


def add_options(add: AddOption) -> None:
    """This benchmark's own."""
    count = at_least(1)
    add("--exits", "number of exits, spread over the lower 3/4 of the layers", type=count, default=2, metavar="N")
    add("--tokens", "tokens of a microbatch", type=at_least(2), default=1024, metavar="N")
    add("--microbatches", "of a step", type=count, default=16, metavar="N")
    add("--dtype", "of the model", choices=DTYPES, default="bfloat16")


def measure(options: argparse.Namespace, directory: Path) -> Result:
    """Compare, in turns."""
    model = model_directory(options, directory, options.dtype)
    described = describe_model(options, model)
    exits = exit_layers(options.exits, described["layers"])
    settings = {
        "directory": str(model),
        "exits": exits,
        **{name: getattr(options, name) for name in ("dtype", "tokens", "microbatches")},
    }
    with ExitStack() as stack:
        sides = {
            kind: stack.enter_context(Side("quantised", {"kind": kind, "saved": str(directory), **settings}))
            for kind in QUANTISE
        }
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in sides}
        for number in range(1 + options.repeats):  # the first step allocates
            for kind, side in sides.items():
                step = side.call("step")
                found[kind] += [step] if number else []
        memory = {kind: side.call("backbone_bytes") for kind, side in sides.items()}
        for side in sides.values():
            side.call("save")
        agreements = {kind: side.call("agreements") for kind, side in sides.items()}
    elapsed = {kind: median_of(steps, "seconds") for kind, steps in found.items()}
    rows = [
        {
            "weights": kind,
            "backbone_mb": memory[kind] / 1e6,
            "memory": memory[kind] / memory[PLAIN],
            "step_seconds": elapsed[kind],
            "time": elapsed[kind] / elapsed[PLAIN],
            "agreement": agreements[kind][kind],
            "on_plain": agreements[PLAIN][kind],
            "of_plain": agreements[kind][PLAIN],
            "steps": found[kind],
        }
        for kind in sides
    ]
    described |= settings
    limits = {"tokens_per_second": options.tokens * options.microbatches / elapsed[PLAIN]}
    return Result("Packed layers", described, COLUMNS, limits, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return run("quantised", DESCRIPTION, add_options, measure, argv, repeats=5)


if __name__ == "__main__":
    sys.exit(main())
