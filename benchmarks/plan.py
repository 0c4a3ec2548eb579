"""The time that ``plan --measured`` forecasts for a step against the steps of ``tune``, on CPU ranks over gloo."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import AddOption, Result, run, take_turns
from benchmarks.models import describe_model, exit_layers, model_directory
from benchmarks.pipeline import make_corpus, tune, write_config
from benchmarks.processes import megatron_ee_command, run_processes
from megatron_ee.commands import DTYPES, at_least

DESCRIPTION = """Forecast a step with megatron-ee plan --measured, then run megatron-ee tune, in turns: on one process
with exits of several kinds, and on two with each kind of parallelism, one process of --threads threads each. The times
of steps come from the runs' own logs. A forecast within 25% of the measured time is what the plan promises."""
COLUMNS = (
    ("run", "run", ""),
    ("planned", "planned s", ",.3f"),
    ("measured", "measured s", ",.3f"),
    ("ratio", "planned / measured", ".2f"),
)
KINDS = {
    "mlp exits, own heads": {"init": "copy"},
    "mlp exits, shared heads": {"init": "copy", "head": "shared"},
    "norm exits, low-rank heads": {"init": "copy", "body": "norm", "head": "low_rank"},
    "layer exits, own heads": {"init": "copy", "body": "layer"},
}
SIZES: dict[str, dict[str, Any]] = {
    "2 pipeline stages": {"pipeline": 2},
    "tensor 2": {"tensor": 2},
    "tensor 2, sequence": {"tensor": 2, "sequence": True},
    "2 replicas": {},
}


def add_options(add: AddOption) -> None:
    """This benchmark's own."""
    count = at_least(1)
    add("--exits", "number of exits, spread over the lower 3/4 of the layers", type=count, default=4, metavar="N")
    add("--microbatches", "sequences per step", type=count, default=8, metavar="N")
    add("--tokens", "length of each", type=at_least(2), default=512, metavar="N")
    add("--steps", "measured steps of each run", type=count, default=3, metavar="N")
    add("--dtype", "of the model", choices=DTYPES, default="float32")


def measure(options: argparse.Namespace, directory: Path) -> Result:
    """Compare, in turns."""
    model = model_directory(options, directory, options.dtype)
    described = describe_model(options, model)
    exits, corpus = exit_layers(options.exits, described["layers"]), make_corpus(model, directory)
    write = partial(write_config, options, directory, model, corpus, exits)
    cases = {kind: (write({}, settings), 1) for kind, settings in KINDS.items()}
    cases |= {size: (write(parallel, KINDS["mlp exits, own heads"]), 2) for size, parallel in SIZES.items()}
    works: dict[str, Any] = {}
    for name, (config, ranks) in cases.items():
        works[f"plan {name}"] = partial(forecast, config, ranks)
        works[f"tune {name}"] = partial(step_seconds, config, directory, options, ranks)
    found = take_turns(works, options.repeats, warm_up=0)
    rows = []
    for name in cases:
        planned, measured = (statistics.median(found[f"{side} {name}"]) for side in ("plan", "tune"))
        row = {"run": name, "planned": planned, "measured": measured, "ratio": planned / measured}
        rows.append({**row, "rounds": [found[f"{side} {name}"] for side in ("plan", "tune")]})
    names = ("microbatches", "tokens", "dtype")
    settings = {**described, "exits": exits, **{name: getattr(options, name) for name in names}}
    worst = max(max(row["ratio"], 1 / row["ratio"]) for row in rows)
    return Result("Plan against measured steps", settings, COLUMNS, {"worst_ratio": worst}, rows)


def forecast(config: Path, ranks: int) -> float:
    """Seconds of a step, as ``plan --measured`` says on this machine now."""
    arguments = ("plan", "--config", str(config), "--measured", "--json")
    ended = run_processes(megatron_ee_command(*arguments), ranks=ranks, CUDA_VISIBLE_DEVICES="")
    return float(json.loads(ended.output)["run"]["step_seconds"])


def step_seconds(config: Path, directory: Path, options: argparse.Namespace, ranks: int) -> float:
    """Median time of a step of ``tune``."""
    rate = tune(config, directory, options.steps, ranks)["rate"]
    return float(options.microbatches * options.tokens / rate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return run("plan", DESCRIPTION, add_options, measure, argv, repeats=3, threads=1)


if __name__ == "__main__":
    sys.exit(main())
