"""The measurements as tables: ratios first, the absolute figures beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megatron_ee.benchmark.results import LoadBenchmark, LossComparison, StepComparison, TuneBenchmark

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_tune(result: TuneBenchmark, console: Console) -> None:
    """Two tables: steps, and the exit loss alone."""
    model = result.model
    console.print(
        f"{_machine(result.machine)}; {model['parameters'] / 1e6:.0f}M parameters, hidden {model['hidden']}, "
        f"{model['layers']} layers, vocabulary {model['vocab']}, sequence {model['sequence_length']}, micro-batch 1"
    )
    table = _table(
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
    table = _table(
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
        f"{_machine(result.machine)}; {model['path'] or 'random model'}: {model['bytes'] / 1e6:,.0f} MB in "
        f"{model['tensors']} tensors, stored {model['stored_dtype']}, loaded {model['dtype']}; files in the page cache"
    )
    table = _table("Loading against reading the same bytes", ("", "ratio", "seconds", "MB/s"))
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


def _table(title: str, *headers: Iterable[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE)
    for number, lines in enumerate(zip(*headers, strict=True)):
        table.add_column("\n".join(lines), justify="left" if number == 0 else "right")
    return table


def _mb(rate: float) -> str:
    return f"{rate / 1e6:,.0f}"


def _machine(machine: dict[str, Any]) -> str:
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    return f"{where}, load before {machine['load_before']:.1f}"
