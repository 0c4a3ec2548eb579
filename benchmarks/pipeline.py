"""Pipeline layouts against one process, on CPU ranks over gloo, and what the plan expects of them."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.common import AddOption, Result, run, take_turns
from benchmarks.models import describe_model, exit_layers, model_directory, sample_text
from benchmarks.processes import Side, megatron_ee_command, run_processes
from megatron_ee.commands import DTYPES, at_least

DESCRIPTION = """Run megatron-ee tune on one process and in pipeline stages, one process of --threads threads each, in
turns: with the layout that the plan balances, and with equal runs of layers and each exit at its layer. Speeds come
from the runs' own logs. Expected is what the plan's simulation says from counted FLOPs. The machine's limit is how many
times as fast so many processes multiply together as one does alone."""
COLUMNS = (
    ("layout", "layout", ""),
    ("tokens_per_second", "tokens/s", ",.1f"),
    ("speedup", "/ one process", ".2fx"),
    ("expected", "expected", ".2fx"),
    ("limit", "the machine's limit", ".2fx"),
    ("peak_mb", "peak MB of a rank", ",.0f"),
    ("stages", "layers and exits of each stage", ""),
)
ONE = "one process"
WARM_UP = 2  # steps of each run: the first allocates


def add_options(add: AddOption) -> None:
    """This benchmark's own."""
    count = at_least(1)
    add("--stages", "numbers of pipeline stages", type=at_least(2), nargs="+", default=[2], metavar="N")
    add("--exits", "number of exits, spread over the lower 3/4 of the layers", type=count, default=4, metavar="N")
    add("--microbatches", "sequences per step", type=count, default=8, metavar="N")
    add("--tokens", "length of each", type=at_least(2), default=128, metavar="N")
    add("--steps", "measured steps of each run", type=count, default=3, metavar="N")
    add("--dtype", "of the model", choices=DTYPES, default="float32")


def measure(options: argparse.Namespace, directory: Path) -> Result:
    """Compare, in turns."""
    model = model_directory(options, directory, options.dtype)
    described = describe_model(options, model)
    exits = exit_layers(options.exits, described["layers"])
    corpus = make_corpus(model, directory)
    blocks = {ONE: parallel_block(1), **{f"{n} stages, balanced": parallel_block(n) for n in options.stages}}
    blocks |= {f"{n} stages, even": parallel_block(n, exits) for n in options.stages if n <= exits[-1]}
    configs = {name: write_config(options, directory, model, corpus, exits, block) for name, block in blocks.items()}
    found = take_turns(
        {
            name: partial(tune, path, directory, options.steps, blocks[name]["pipeline"])
            for name, path in configs.items()
        },
        options.repeats,
        warm_up=0,  # each run has its own
    )
    limits = matmul_limits(options.dtype, [1, *options.stages])
    rate = {name: statistics.median(each["rate"] for each in rounds) for name, rounds in found.items()}
    rows = []
    for name, config in configs.items():
        ranks = blocks[name]["pipeline"]
        plan = describe_plan(config, ranks)
        rows.append(
            {
                "layout": name,
                "tokens_per_second": rate[name],
                "speedup": rate[name] / rate[ONE],
                "expected": ranks * plan.efficiency,
                "limit": limits[ranks] / limits[1],
                "peak_mb": max(max(each["peak"]) for each in found[name]) / 1e6,
                "stages": "; ".join(_stage(stage.layers, stage.exits) for stage in plan.stages),
                "rounds": [each["rate"] for each in found[name]],
            }
        )
    names = ("microbatches", "tokens", "dtype")
    settings = {**described, "exits": exits, **{name: getattr(options, name) for name in names}}
    matmul = {f"matmul_GFLOP_per_second_of_{ranks}": value / 1e9 for ranks, value in limits.items()}
    return Result("Pipeline layouts", settings, COLUMNS, matmul, rows)


def make_corpus(model: Path, directory: Path) -> Path:
    """A corpus of some text, made as a user makes one."""
    text, prefix = directory / "text.jsonl", directory / "corpus"
    text.write_text(json.dumps({"text": sample_text()}) + "\n")
    arguments = ["--input", str(text), "--tokenizer", str(model), "--output", str(prefix)]
    run_processes(megatron_ee_command("prepare-data", *arguments))
    return prefix


def parallel_block(stages: int, exits: Sequence[int] | None = None) -> dict[str, Any]:
    """The configuration's ``parallel``: balanced, or with ``exits`` equal runs of layers up to the deepest of them."""
    if exits is None:
        return {"pipeline": stages}
    bounds = [exits[-1] * index // stages for index in range(stages + 1)]
    layout = [
        {"layers": [first + 1, last], "exits": [layer for layer in exits if first < layer <= last]}
        for first, last in zip(bounds, bounds[1:], strict=False)
    ]
    return {"pipeline": stages, "layout": layout}


def write_config(
    options: argparse.Namespace,
    directory: Path,
    model: Path,
    corpus: Path,
    exits: list[int],
    parallel: dict[str, Any],
    kind: Mapping[str, Any] = MappingProxyType({"init": "copy"}),
) -> Path:
    """A run that only steps: no validation, no checkpoint before its end. ``kind``: settings of each exit."""
    config = {
        "model": {"path": str(model), "dtype": options.dtype},
        "exits": [{"layer": layer, **kind} for layer in exits],
        "data": {"train": [str(corpus)], "sequence_length": options.tokens},
        "parallel": parallel,
        "tuning": {"steps": WARM_UP + options.steps, "global_batch_size": options.microbatches, "micro_batch_size": 1},
        "checkpoint": {"interval": 0},
        "logging": {"tensorboard": False},
    }
    path = directory / f"run-{len(list(directory.glob('run-*')))}.yaml"
    path.write_text(json.dumps(config))  # YAML holds JSON
    return path


def tune(config: Path, directory: Path, steps: int, ranks: int) -> dict[str, Any]:
    """One run: its median ``rate`` in tokens per second after the first steps, and the ``peak`` of each rank."""
    output = directory / "output"
    arguments = megatron_ee_command("tune", "--config", str(config), "--output", str(output))
    ended = run_processes(arguments, ranks=ranks, CUDA_VISIBLE_DEVICES="")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    output.rename(directory / f"output-{len(list(directory.glob('output-*')))}")
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return {"rate": statistics.median(rates[-steps:]), "peak": ended.peak_memory}


def matmul_limits(dtype: str, counts: Sequence[int]) -> dict[int, float]:
    """By number of processes, the operations per second of products of matrices that they reach together."""
    with ExitStack() as stack:
        sides = [stack.enter_context(Side("machine", {"dtype": dtype})) for _ in range(max(counts))]
        for side in sides:
            side.call("matmul_rate")  # until all have started

        def together(count: int) -> float:
            for side in sides[:count]:
                side.start("matmul_rate")
            return sum(side.finish() for side in sides[:count])

        found = take_turns({str(count): partial(together, count) for count in counts}, 3, warm_up=0)
    return {int(count): max(rates) for count, rates in found.items()}


def describe_plan(config: Path, ranks: int) -> Any:
    """The plan that ``megatron-ee tune`` prints before it starts."""
    from megatron_ee.config.check import check_run
    from megatron_ee.config.load import load_config
    from megatron_ee.families.registry import read_architecture
    from megatron_ee.planning.balance import resolve_layout
    from megatron_ee.planning.plan import plan_run

    loaded = load_config(config)
    architecture = read_architecture(Path(loaded.model.path))
    specs = check_run(loaded, architecture, ranks)
    layout = resolve_layout(loaded.parallel, specs, architecture, loaded.data.sequence_length)
    return plan_run(loaded, layout, architecture, specs, ranks, accelerator=False)


def _stage(layers: range, exits: Sequence[int]) -> str:
    held = f"{layers[0]}-{layers[-1]}" if layers else "none"
    return f"{held} ({', '.join(map(str, exits)) or 'no exit'})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return run("pipeline", DESCRIPTION, add_options, measure, argv, repeats=3, threads=1)


if __name__ == "__main__":
    sys.exit(main())
