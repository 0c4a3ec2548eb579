"""The tuning step and its loss against plain PyTorch, interleaved. This process imports no torch and stays small."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from megatron_ee.benchmark.results import LossComparison, SideResult, StepComparison, TuneBenchmark
from megatron_ee.benchmark.shape import Shape, Step, loss_flops, matmul_shapes, spread_exits
from megatron_ee.benchmark.worker import Worker, quiet_enough, start_worker
from megatron_ee.progress import Progress, track

_PACKAGE = "megatron_ee.benchmark"
WARM_UP = 2  # steps before the measured ones: the first allocates, the second shows that the first updated alike
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-3}  # relative
WAYS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # torch's chunked loss is itself rounded to the dtype
NORM_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # relative
WAYS = ("ours", "linear_cross_entropy", "plain")


def benchmark_tune(
    shape: Shape, *, tokens: int, exits: Sequence[int], dtypes: Sequence[str], repeats: int, chunk_tokens: int
) -> TuneBenchmark:
    """Measure steps with each number of exits and dtype, then the exit loss alone in each dtype.

    Args:
        shape: of the random model that is made for this.
        tokens: sequence length; the micro-batch is one sequence.
        exits: numbers of ``mlp`` exits.
        repeats: measured steps of each side.
        chunk_tokens: of our loss, and of torch's chunked one.

    Raises:
        ConfigError: the model or its exits cannot be.
        UserError: a process did not survive.
        RuntimeError: the two sides do not compute the same.
    """
    shape.check()
    load = quiet_enough()
    places = [spread_exits(count, shape.layers) for count in exits]
    rounds = (len(dtypes) * len(places) + len(dtypes)) * (WARM_UP + repeats)
    with (
        tempfile.TemporaryDirectory(prefix="megatron-ee-") as directory,
        start_worker("the machine's own rate", f"{_PACKAGE}.machine:machine") as machine,
        track(rounds, "rounds", "benchmark tune") as bar,
    ):
        machine.call("make_model", directory, shape, "float32", tokens)
        model = {
            "hidden": shape.hidden,
            "layers": shape.layers,
            "ffn": shape.ffn,
            "heads": shape.heads,
            "vocab": shape.vocab,
            "parameters": shape.parameters,
            "sequence_length": tokens,
        }
        steps, losses = [], []
        for dtype in dtypes:
            for layers in places:
                step = Step(directory, shape, layers, dtype, tokens, chunk_tokens)
                steps.append(_compare_steps(step, machine, repeats, bar))
            step = Step(directory, shape, places[0], dtype, tokens, chunk_tokens)
            losses.append(_compare_losses(step, machine, repeats, bar))
            machine.call("forget")
        return TuneBenchmark({**machine.call("describe"), "load_before": load}, model, steps, losses)


def _compare_steps(step: Step, machine: Worker, repeats: int, bar: Progress) -> StepComparison:
    bar.describe(f"step, {step.dtype}, {len(step.exits)} exits")
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(start_worker(title, f"{_PACKAGE}.{name}:{name}", step))
            for name, title in (("ours", "our step"), ("plain", "plain PyTorch's step"))
        }
        first: dict[str, Any] = {}
        for number in range(WARM_UP):
            done = {name: side.call("step") for name, side in sides.items()}
            check_same(step.dtype, number, done["ours"], done["plain"])
            first = first or done
            bar.advance()
        times: dict[str, list[float]] = {name: [] for name in sides}
        rate = 0.0
        for _ in range(repeats):
            for name, side in sides.items():
                times[name].append(side.call("step")["seconds"])
            rate = max(rate, _matmul_rate(step, machine))
            bar.advance()
        results = {name: _side(step, side, times[name], first[name], rate) for name, side in sides.items()}
    ours, plain = results["ours"], results["plain"]
    return StepComparison(
        step.dtype,
        list(step.exits),
        ours,
        plain,
        rate,
        speed_ratio=ours.tokens_per_second / plain.tokens_per_second,
        memory_ratio=ours.peak_memory / plain.peak_memory,
    )


def _side(step: Step, side: Worker, times: list[float], first: dict[str, Any], rate: float) -> SideResult:
    median, flops = statistics.median(times), side.call("flops")
    return SideResult(
        tokens_per_second=step.tokens / median,
        step_seconds=times,
        peak_memory=side.call("peak_memory"),
        flops=flops,
        matmul_share=flops / median / rate,
        losses=first["losses"],
        grad_norm=first["grad_norm"],
    )


def check_same(dtype: str, number: int, ours: dict[str, Any], plain: dict[str, Any]) -> None:
    """Raise RuntimeError unless both sides' losses and gradient norm of one step agree: it must be the same work."""
    pairs = list(zip(ours["losses"], plain["losses"], strict=True))
    close = all(math.isclose(a, b, rel_tol=LOSS_TOLERANCE[dtype]) for a, b in pairs)
    if not close or not math.isclose(ours["grad_norm"], plain["grad_norm"], rel_tol=NORM_TOLERANCE[dtype]):
        raise RuntimeError(f"step {number}, {dtype}: the two sides do not compute the same: {ours} and {plain}")


def _compare_losses(step: Step, machine: Worker, repeats: int, bar: Progress) -> LossComparison:
    bar.describe(f"exit loss, {step.dtype}")
    with start_worker("the exit loss", f"{_PACKAGE}.losses:losses", step) as worker:
        ways = [way for way in WAYS if way in worker.call("ways")]
        values: dict[str, float] = {}
        for _ in range(WARM_UP):
            values = {way: worker.call("run", way)["loss"] for way in ways}
            bar.advance()
        if not all(
            math.isclose(values["ours"], value, rel_tol=WAYS_TOLERANCE[step.dtype]) for value in values.values()
        ):
            raise RuntimeError(f"exit loss, {step.dtype}: the ways do not compute the same: {values}")
        times: dict[str, list[float]] = {way: [] for way in ways}
        rate = 0.0
        for _ in range(repeats):
            for way in ways:
                times[way].append(worker.call("run", way)["seconds"])
            rate = max(rate, _matmul_rate(step, machine))
            bar.advance()
    medians: dict[str, float] = {way: statistics.median(times[way]) for way in ways}
    return LossComparison(
        step.dtype,
        seconds={way: medians.get(way) for way in WAYS},
        losses={way: values.get(way) for way in WAYS},
        speed_ratio={way: medians[way] / medians["ours"] if way in medians else None for way in WAYS[1:]},
        matmul_share=loss_flops(step) / medians["ours"] / rate,
    )


def _matmul_rate(step: Step, machine: Worker) -> float:
    return max(machine.call("matmul_rate", step.dtype, product) for product in matmul_shapes(step))
