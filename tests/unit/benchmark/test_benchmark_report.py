"""The tables show the ratios and figures that they are given, each in its place."""

from __future__ import annotations

import io

from rich.console import Console

from megatron_ee.benchmark.report import print_load, print_tune
from megatron_ee.benchmark.results import LoadBenchmark, LossComparison, SideResult, StepComparison, TuneBenchmark

MACHINE = {"device": "cpu", "threads": 2, "torch": "2.13.0", "load_before": 0.3}
MODEL = {"parameters": 110e6, "hidden": 768, "layers": 12, "vocab": 32000, "sequence_length": 2048}


def console() -> Console:
    return Console(file=io.StringIO(), width=160, highlight=False)


def cells(shown: Console, start: str) -> list[str]:
    """Words of the first line of a table's body that begins with ``start``."""
    text: str = shown.file.getvalue()  # type: ignore[attr-defined]
    return next(line.split() for line in text.splitlines() if line.strip().startswith(start))


def test_a_step_and_a_loss() -> None:
    ours = SideResult(300.0, [1.0], 2_000_000_000, 10, 0.5, [3.0], 1.0)
    plain = SideResult(200.0, [1.5], 4_000_000_000, 12, 0.25, [3.0], 1.0)
    step = StepComparison("float32", [3, 6], ours, plain, 150e9, speed_ratio=1.5, memory_ratio=0.5)
    seconds = {"ours": 1.0, "plain": 2.8, "linear_cross_entropy": None}
    ratios = {"plain": 2.8, "linear_cross_entropy": None}
    loss = LossComparison("bfloat16", seconds, dict(seconds), ratios, 0.75)
    shown = console()
    print_tune(TuneBenchmark(MACHINE, MODEL, [step], [loss]), shown)
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "110M parameters" in text
    assert "load before 0.3" in text
    expected = ["float32", "2", "1.50x", "0.50x", "300.0", "200.0", "2,000", "4,000", "50%", "25%", "150"]
    assert cells(shown, "float32") == expected
    # This torch has no linear_cross_entropy.
    assert cells(shown, "bfloat16") == ["bfloat16", "-", "2.80x", "1.0000", "-", "2.8000", "75%"]


def test_loading() -> None:
    model = {"path": None, "bytes": 1e9, "tensors": 9, "files": 1, "dtype": "bfloat16", "stored_dtype": "float32"}
    rates = {"load_rate": 2e9, "read_rate": 4e9, "keep_rate": 1e9, "hash_rate": 5e8, "sha256_rate": 1.4e9}
    times = {"load_seconds": 0.5, "read_seconds": 0.25, "keep_seconds": 1.0, "hash_seconds": 2.0}
    ratios = {"load_ratio": 2.0, "load_keep_ratio": 0.5, "hash_ratio": 4.0}
    shown = console()
    print_load(LoadBenchmark(machine=MACHINE, model=model, **rates, **times, **ratios), shown)
    assert cells(shown, "load ") == ["load", "0.500", "2,000"]
    assert cells(shown, "read, bytes dropped")[3:] == ["load", "is", "2.00x", "0.250", "4,000"]
    assert cells(shown, "read, bytes kept")[3:] == ["load", "is", "0.50x", "1.000", "1,000"]
    assert cells(shown, "hash")[-2:] == ["2.000", "500"]
    assert cells(shown, "SHA-256")[-1] == "1,400"
