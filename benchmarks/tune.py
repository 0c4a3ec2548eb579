"""The tuning step against plain PyTorch doing the same work."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import AddOption, Result, median_of, run, take_turns
from benchmarks.models import describe_model, exit_layers, model_directory
from benchmarks.processes import Side
from megatron_ee.commands import DTYPES, at_least

DESCRIPTION = """Time the tuning step against plain PyTorch doing the same work: the transformers model frozen, the same
exits as ordinary modules, autograd. Both take the same batch of one random sequence, step by step in turns, each in a
process of its own; their losses and gradient norms must agree. Every exit is an mlp exit with a head of its own."""
COLUMNS = (
    ("side", "side", ""),
    ("tokens_per_second", "tokens/s", ",.1f"),
    ("speed", "speed", ".2fx"),
    ("peak_mb", "peak MB", ",.0f"),
    ("memory", "memory", ".2fx"),
    ("matmul_share", "of the matmul rate", ".0%"),
)
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (2e-3, 3e-2)}
"""Relative, of losses and gradient norms."""


def add_options(add: AddOption) -> None:
    """This benchmark's own."""
    add("--exits", "number of exits, spread over the lower 3/4 of the layers", type=at_least(1), default=4, metavar="N")
    add("--tokens", "length of the sequence", type=at_least(2), default=512, metavar="N")
    add("--dtype", "of the model", choices=DTYPES, default="float32")


def measure(options: argparse.Namespace, directory: Path) -> Result:
    """Compare, in turns."""
    model = model_directory(options, directory, options.dtype)
    described = describe_model(options, model)
    exits = exit_layers(options.exits, described["layers"])
    settings = {"directory": str(model), "exits": exits, "dtype": options.dtype, "tokens": options.tokens}
    with (
        Side("ours", settings) as ours,
        Side("plain", settings) as plain,
        Side("machine", {"dtype": options.dtype}) as machine,
    ):
        sides = {"ours": ours, "plain PyTorch": plain}
        first = {name: side.call("step") for name, side in sides.items()}
        check_same(options.dtype, *first.values())
        works: dict[str, Any] = {name: lambda side=side: side.call("step") for name, side in sides.items()}
        works["machine"] = lambda: {"rate": machine.call("matmul_rate")}
        found = take_turns(works, options.repeats)
        check_same(options.dtype, *(found[name][-1] for name in sides))
        memory = {name: side.call("peak_memory") for name, side in sides.items()}
        flops = {name: side.call("flops") for name, side in sides.items()}  # last: counting takes memory
        device = machine.call("device")
    rate = max(each["rate"] for each in found["machine"])
    elapsed = {name: median_of(found[name], "seconds") for name in sides}
    rows = [
        {
            "side": name,
            "tokens_per_second": options.tokens / elapsed[name],
            "speed": elapsed["plain PyTorch"] / elapsed[name],
            "peak_mb": memory[name] / 1e6,
            "memory": memory[name] / memory["plain PyTorch"],
            "matmul_share": flops[name] / elapsed[name] / rate,
            "step_seconds": [each["seconds"] for each in found[name]],
            "losses": first[name]["losses"],
        }
        for name in sides
    ]
    described |= {"exits": exits, "dtype": options.dtype, "tokens": options.tokens, "device": device}
    limits = {"matmul_GFLOP_per_second": rate / 1e9}
    return Result("Tuning step", described, COLUMNS, limits, rows)


def check_same(dtype: str, ours: dict[str, Any], plain: dict[str, Any]) -> None:
    """Raise RuntimeError unless losses and gradient norm of one step agree: it must be the same work."""
    of_loss, of_norm = TOLERANCE[dtype]
    close = [math.isclose(a, b, rel_tol=of_loss) for a, b in zip(ours["losses"], plain["losses"], strict=True)]
    if not all(close) or not math.isclose(ours["grad_norm"], plain["grad_norm"], rel_tol=of_norm):
        raise RuntimeError(f"the two sides do not compute the same: {ours} and {plain}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return run("tune", DESCRIPTION, add_options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
