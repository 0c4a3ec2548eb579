"""What all benchmarks share: options, the machine's description, taking turns, and how a result is shown."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from benchmarks.models import SIZES
from megatron_ee.commands import at_least
from megatron_ee.errors import UserError
from megatron_ee.tables import add_columns, make_console, new_table

BUSY = 0.25
"""A run that starts under more load per CPU than this gets a warning."""
T = TypeVar("T")
AddOption = Callable[..., None]


@dataclass
class Result:
    """What a benchmark found.

    Attributes:
        settings: what was measured.
        limits: what the machine itself can do, by name with its unit.
        rows: figures of each thing that was compared, by the keys of ``columns``; None or missing where there is none.
        columns: key of a figure, its heading, and how it is written, such as ``,.1f``; empty for words.
    """

    title: str
    settings: dict[str, Any]
    columns: tuple[tuple[str, str, str], ...]
    limits: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def run(
    name: str,
    description: str,
    add_options: Callable[[AddOption], None],
    measure: Callable[[argparse.Namespace, Path], Result],
    argv: Sequence[str] | None = None,
    *,
    repeats: int = 5,
    threads: int | None = None,
) -> int:
    """Read the command line, measure in a temporary directory, print a table or JSON; the exit status.

    Args:
        name: of the module.
        add_options: adds the benchmark's own options, see ``adder``.
        measure: called with the options and the directory.
        argv: the command line; None for the process's own.
        repeats: default of ``--repeats``.
        threads: default of ``--threads``; None for one per CPU.
    """
    threads = threads or len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    add = adder(parser)
    add("--model", "Hugging Face directory, in place of a random model of --size", type=Path, metavar="DIR")
    add("--size", "of the random model, by its parameters", choices=SIZES, default="46m")
    add("--repeats", "measured rounds; their median counts", type=at_least(1), default=repeats, metavar="N")
    add("--threads", "CPU threads that compute", type=at_least(1), default=threads, metavar="N")
    add("--busy", "processes that keep a CPU busy each meanwhile", type=at_least(0), default=0, metavar="N")
    add("--json", "print one JSON object in place of the table", action="store_true")
    add_options(add)
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes started from here on
    machine = describe_machine(options.threads, options.busy)
    try:
        with tempfile.TemporaryDirectory(prefix="megatron-ee-") as directory, busy_processes(options.busy):
            result = measure(options, Path(directory))
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    show(name, machine, result, as_json=options.json)
    return 0


def adder(parser: argparse.ArgumentParser) -> AddOption:
    """``add_argument`` that takes the help second, and says the default in it."""

    def add(name: str, text: str, **settings: Any) -> None:
        default = f" (default: {settings['default']})" if settings.get("default") is not None else ""
        parser.add_argument(name, help=text + default, **settings)

    return add


def describe_machine(threads: int, busy: int) -> dict[str, Any]:
    """What stands beside the figures; warns on stderr where other processes keep the machine busy."""
    load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > BUSY * cpus:
        print(f"the machine is busy (load {load:.1f} on {cpus} CPUs): do not trust these figures", file=sys.stderr)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "unknown",
        "cpus": cpus,
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "busy_processes": busy,
        "load_before": load,
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
    }


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that each keep a CPU busy, as others do on a shared machine."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def take_turns(works: Mapping[str, Callable[[], T]], repeats: int, warm_up: int = 1) -> dict[str, list[T]]:
    """Call each of ``works`` once per round, so that all see the same machine.

    Returns:
        by name, what the calls gave, without those of the first ``warm_up`` rounds.
    """
    found: dict[str, list[T]] = {name: [] for name in works}
    rounds = [(number, name) for number in range(warm_up + repeats) for name in works]
    console = Console(stderr=True)
    for number, name in track(rounds, "measuring", console=console, transient=True, disable=not console.is_terminal):
        value = works[name]()
        if number >= warm_up:
            found[name].append(value)
    return found


def median_of(values: Iterable[Mapping[str, Any]], key: str) -> float:
    """Median of one figure over the rounds."""
    return statistics.median(value[key] for value in values)


def show(name: str, machine: Mapping[str, Any], result: Result, *, as_json: bool) -> None:
    """Print to stdout: one JSON object, or the machine, what was measured, the table and the machine's limits."""
    if as_json:
        parts = {"settings": result.settings, "limits": result.limits, "rows": result.rows}
        print(json.dumps({"benchmark": name, "machine": machine, **parts}))
        return
    console = make_console()
    for described in (machine, result.settings):
        console.print("; ".join(f"{key.replace('_', ' ')} {value}" for key, value in described.items()), soft_wrap=True)
    table = new_table(result.title, console)
    for _, heading, form in result.columns:
        add_columns(table, heading, words=not form)
    for row in result.rows:
        table.add_row(*(_cell(row.get(key), form) for key, _, form in result.columns))
    console.print(table)
    limits = ", ".join(f"{key.replace('_', ' ')} {value:,.1f}" for key, value in result.limits.items())
    console.print(f"This machine: {limits}.", soft_wrap=True)


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form.rstrip("x")) + ("x" if form.endswith("x") else "")
