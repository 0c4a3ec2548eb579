"""The measurements as tables: ratios first, the absolute figures beside them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megatron_ee.benchmark.results import (
    Conversion,
    ConvertBenchmark,
    Direction,
    LinkTraffic,
    LoadBenchmark,
    LossComparison,
    MemoryBenchmark,
    PipelineBenchmark,
    RankMemory,
    ShardedLoad,
    ShardedLoads,
    StageShare,
    StepComparison,
    TuneBenchmark,
)
from megatron_ee.benchmark.saving import SavingBenchmark

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_tune(result: TuneBenchmark, console: Console) -> None:
    """Two tables: steps, and the exit loss alone."""
    model = result.model
    console.print(
        f"{machine_line(result.machine)}; {model['parameters'] / 1e6:.0f}M parameters, hidden {model['hidden']}, "
        f"{model['layers']} layers, vocabulary {model['vocab']}, sequence {model['sequence_length']}, micro-batch 1"
    )
    table = make_table(
        "Tuning step, ours against plain PyTorch",
        (
            "dtype",
            "exits",
            "speed",
            "memory",
            "tokens/s",
            "",
            "peak MB",
            "",
            "share of matmul rate",
            "",
            "matmul GFLOP/s",
        ),
        ("", "", "", "", "ours", "plain", "ours", "plain", "ours", "plain", ""),
    )
    for step in result.steps:
        table.add_row(*_step_row(step))
    console.print(table)
    table = make_table(
        "Exit loss alone, forward and backward",
        ("dtype", "linear_cross_entropy", "plain", "seconds", "", "", "share of matmul rate"),
        ("", "/ ours", "/ ours", "ours", "linear_cross_entropy", "plain", "ours"),
    )
    for loss in result.exit_loss:
        table.add_row(*_loss_row(loss))
    console.print(table)


def print_load(result: LoadBenchmark, console: Console) -> None:
    """One table."""
    model = result.model
    console.print(
        f"{machine_line(result.machine)}; {model['path'] or 'random model'}: {model['bytes'] / 1e6:,.0f} MB in "
        f"{model['tensors']} tensors, stored {model['stored_dtype']}, loaded {model['dtype']}; files in the page cache"
    )
    table = make_table("Loading against reading the same bytes", ("", "ratio", "seconds", "MB/s"))
    rows = (
        ("load", "", result.load_seconds, result.load_rate),
        ("read, bytes dropped", f"load is {result.load_ratio:.2f}x", result.read_seconds, result.read_rate),
        ("read, bytes kept", f"load is {result.load_keep_ratio:.2f}x", result.keep_seconds, result.keep_rate),
        ("hash, on top of load", f"{result.hash_ratio:.2f}x of load", result.hash_seconds, result.hash_rate),
    )
    for name, ratio, seconds, rate in rows:
        table.add_row(name, ratio, f"{seconds:.3f}", _mb(rate))
    table.add_row("SHA-256, one core", "", "", _mb(result.sha256_rate))
    console.print(table)


def print_pipeline(result: PipelineBenchmark, console: Console) -> None:
    """Two tables, stages and links, and the efficiency of the whole."""
    stages, microbatches = len(result.stages), result.model["microbatches"]
    computing = "each waits for as long as its work takes alone" if result.simulated else "one thread each"
    console.print(f"{machine_line(result.machine)}; {_shared_step(result.model)}", soft_wrap=True)
    table = make_table(
        f"{stages} stages, {computing}; {microbatches} microbatches per step",
        ("stage", "layers", "exits after", "forward", "final exit", "exits", "busy", "", ""),
        ("", "", "", "ms", "ms", "ms", "measured", "expected", "planned"),
    )
    for index, stage in enumerate(result.stages):
        table.add_row(str(index), *_share_row(stage))
    console.print(table)
    if result.links:
        table = make_table("Sent per microbatch", ("link", "what", "bytes", "least possible", "ratio"))
        for link in result.links:
            table.add_row(*_link_row(link))
        console.print(table)
    console.print(
        f"The stages computed {result.efficiency:.1%} of the time. The plan's simulation expects {result.expected:.1%} "
        f"from these times and {result.planned:.1%} from counted FLOPs; M / (M + P - 1) is {result.reference:.1%}.",
        soft_wrap=True,
    )


def print_memory(result: MemoryBenchmark, console: Console) -> None:
    """One table, and all ranks together."""
    console.print(f"{machine_line(result.machine)}; {_shared_step(result.model)}", soft_wrap=True)
    table = make_table(
        f"Memory {'resident' if result.resident else 'in use'} at the peak, beyond the libraries, of each rank; MiB",
        ("rank", "measured", "planned", "measured", "weights", "gradients", "optimizer", "activations", "transfer"),
        ("", "", "", "/ planned", "planned", "", "", "", ""),
    )
    for row in result.ranks:
        table.add_row(*_memory_row(row))
    console.print(table)
    console.print(
        f"All ranks together, libraries included: {result.together / 2**30:.2f} GiB. "
        f"A step took {result.step_seconds:.2f} s.",
        soft_wrap=True,
    )


FORMATS = {"hf": "Hugging Face", "parallel": "parallel"}


def print_convert(result: ConvertBenchmark, console: Console) -> None:
    """A table for each part."""
    console.print(machine_line(result.machine), soft_wrap=True)
    if result.convert is not None:
        _print_conversion(result.convert, console)
    if result.load is not None:
        _print_loads(result.load, console)
    if result.save is not None:
        _print_saves(result.save, console)


def _print_conversion(result: Conversion, console: Console) -> None:
    console.print(_stored_model(result.model), soft_wrap=True)
    layout = result.layout
    table = make_table(
        f"Hugging Face to parallel (tensor {layout['tensor']}, pipeline {layout['pipeline']}) and back, against cp and "
        "hashes of the same bytes",
        ("to", "convert", "seconds", "", "", "convert", "memory", "target", "libraries"),
        ("", "/ cp + hash", "convert", "cp", "hash", "MB/s", "MiB", "at most", "MiB"),
    )
    for direction in result.directions:
        table.add_row(*_direction_row(direction, result.memory_target))
    table.add_row("both", f"{result.ratio:.2f}x", *("",) * 7)
    table.add_row("target", f"at most {result.ratio_target:.2f}x", *("",) * 7)
    console.print(table)
    resident = max(direction.resident for direction in result.directions)
    console.print(
        f"All {result.identical} tensors and files came back byte for byte. Memory is what the process held beyond its "
        f"libraries. Before each, the page cache was told to forget what is read; {resident:.0%} of it stayed.",
        soft_wrap=True,
    )


def _print_loads(result: ShardedLoads, console: Console) -> None:
    console.print(_stored_model(result.model), soft_wrap=True)
    table = make_table(
        f"Loading on {result.tensor} tensor-parallel ranks, against reading (verified: and hashing) what each needs",
        ("from", "in page", "load", "load", "seconds", "", "", "load", "read", "from disk"),
        ("", "cache", "/ kept", "/ dropped", "load", "kept", "dropped", "MB/s", "/ needed", "/ needed"),
    )
    for load in result.loads:
        table.add_row(*_sharded_row(load))
    table.add_row("target", "", f"at most {result.ratio_target:.2f}x", *("",) * 7)
    console.print(table)
    console.print("Kept is read into new memory for all of it, dropped into a small buffer again and again.")


def _print_saves(result: SavingBenchmark, console: Console) -> None:
    table = make_table(
        f"Tuning stands still for a save of {_mb(result.state['bytes'])} MB in {result.state['tensors']} tensors",
        ("", "seconds", "ratio"),
    )
    rows = (
        ("on the spot", result.synchronous_seconds, f"{result.disk_ratio:.2f}x of write and fsync"),
        ("in the background", result.asynchronous_seconds, f"{result.ratio:.1f}x less"),
        ("the first of these", result.first_seconds, ""),
        ("copy into host memory", result.copy_seconds, f"{result.copy_ratio:.2f}x is in the background"),
        ("write and fsync", result.disk_seconds, ""),
        ("writing in the background", result.writing_seconds, f"products take {result.slowdown:.2f}x meanwhile"),
    )
    for name, seconds, ratio in rows:
        table.add_row(name, f"{seconds:.3f}", ratio)
    console.print(table)


def _stored_model(model: dict[str, Any]) -> str:
    size, largest = (_mb(model[name]) for name in ("bytes", "largest_tensor"))
    return (
        f"{model['dtype']}, hidden {model['hidden']}, {model['layers']} layers, vocabulary {model['vocab']}: "
        f"{size} MB in {model['tensors']} tensors of at most {largest} MB"
    )


def _direction_row(direction: Direction, memory_target: int) -> Iterable[str]:
    times = (direction.seconds, direction.copy_seconds, direction.hash_seconds)
    return (
        FORMATS[direction.to],
        f"{direction.ratio:.2f}x",
        *(f"{statistics.median(seconds):.2f}" for seconds in times),
        _mb(direction.rate),
        *(f"{size / 2**20:,.0f}" for size in (direction.memory, memory_target, direction.libraries)),
    )


def _sharded_row(load: ShardedLoad) -> Iterable[str]:
    where = f"{FORMATS[load.format]}{', verified' * load.verified}, {'cold' if load.cold else 'warm'}"
    times = (load.load_seconds, load.read_seconds, load.reuse_seconds)
    return (
        where,
        f"{load.resident:.0%}",
        f"{load.ratio:.2f}x",
        f"{load.reuse_ratio:.2f}x",
        *(f"{statistics.median(seconds):.2f}" for seconds in times),
        _mb(load.rate),
        f"{load.read_ratio:.3f}x",
        f"{load.disk / sum(load.needed):.3f}x",
    )


def _share_row(stage: StageShare) -> Iterable[str]:
    times = (stage.forward_seconds, stage.teach_seconds, stage.exits_seconds)
    return (
        f"{stage.layers[0]}-{stage.layers[-1]}" if stage.layers else "-",
        ", ".join(map(str, stage.exits)) or "-",
        *(f"{1e3 * seconds:,.1f}" for seconds in times),
        *(f"{share:.1%}" for share in (stage.busy, stage.expected, stage.planned)),
    )


def _link_row(link: LinkTraffic) -> Iterable[str]:
    what = "verdicts" if link.verdicts else "h, taps"
    return (f"{link.source} to {link.target}", what, f"{link.bytes:,.0f}", f"{link.least:,}", f"{link.ratio:.3f}x")


def _memory_row(row: RankMemory) -> Iterable[str]:
    plan = row.planned
    parts = (plan.frozen + plan.trained, plan.gradients, plan.optimizer, plan.activations, plan.transfer)
    return (
        f"stage {row.stage}, {row.tensor_rank}",
        *(f"{size / 2**20:,.1f}" for size in (row.measured, plan.total)),
        f"{row.ratio:.3f}x",
        *(f"{size / 2**20:,.1f}" for size in parts),
    )


def _shared_step(model: dict[str, Any]) -> str:
    exits = ", ".join(f"{layer} {body}/{head}" for layer, body, head in model["exits"])
    return (
        f"{model['dtype']}, hidden {model['hidden']}, {model['layers']} layers, vocabulary {model['vocab']}, sequence "
        f"{model['sequence_length']}, micro-batch 1; exits {exits}" + ("; distillation" * model["distillation"])
    )


def _step_row(step: StepComparison) -> Iterable[str]:
    ours, plain = step.ours, step.plain
    return (
        step.dtype,
        str(len(step.exits)),
        f"{step.speed_ratio:.2f}x",
        f"{step.memory_ratio:.2f}x",
        f"{ours.tokens_per_second:,.1f}",
        f"{plain.tokens_per_second:,.1f}",
        f"{ours.peak_memory / 1e6:,.0f}",
        f"{plain.peak_memory / 1e6:,.0f}",
        f"{ours.matmul_share:.0%}",
        f"{plain.matmul_share:.0%}",
        f"{step.matmul_rate / 1e9:,.0f}",
    )


def _loss_row(loss: LossComparison) -> Iterable[str]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    ratios = [shown(loss.speed_ratio[way], ".2f") for way in ("linear_cross_entropy", "plain")]
    times = [shown(loss.seconds[way], ".4f") for way in ("ours", "linear_cross_entropy", "plain")]
    return (
        loss.dtype,
        *(ratio + "x" if ratio != "-" else ratio for ratio in ratios),
        *times,
        f"{loss.matmul_share:.0%}",
    )


def make_table(title: str, *headers: Iterable[str]) -> Table:
    """A table with headers of one line or more; all columns but the first are figures."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE)
    for number, lines in enumerate(zip(*headers, strict=True)):
        table.add_column("\n".join(lines), justify="left" if number == 0 else "right")
    return table


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f}"


def machine_line(machine: dict[str, Any]) -> str:
    """What was measured on."""
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    return f"{where}, load before {machine['load_before']:.1f}" if "load_before" in machine else where
