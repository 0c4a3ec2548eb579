"""How busy the stages of a pipeline are, and what travels between them. This process imports no torch."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_ee.benchmark.ranks import ParallelStep, started_ranks
from megatron_ee.benchmark.results import LinkTraffic, PipelineBenchmark, Span, StageShare
from megatron_ee.benchmark.worker import Worker, call_all, quiet_enough
from megatron_ee.parallel.plan import StageWork, idle_shares
from megatron_ee.progress import Progress, track

BUSY = ("forward", "teach", "exits")  # what counts as computing; the rest of a stage's time it waits or copies
VERDICT_ITEMSIZE = 4  # of a token id, and of a log-probability
WARM_UP = 1

Link = tuple[int, int, bool]
"""Sending stage, receiving stage, and whether a teacher's verdicts."""
Steps = list[list[list[Span]]]
"""By step and stage, what the stage did."""


def benchmark_pipeline(step: ParallelStep, *, steps: int, simulated: bool) -> PipelineBenchmark:
    """Run ``steps`` tuning steps, one process of one thread per stage.

    Args:
        step: without tensor parallelism.
        steps: that are measured; one before them is not.
        simulated: each stage waits for as long as its work takes alone, measured before, instead of computing, so
            that more stages than cores can be run.

    Raises:
        UserError: a process did not survive.
    """
    load, cores = quiet_enough(), os.cpu_count() or 1
    if step.world_size > cores and not simulated:
        print(f"{step.world_size} stages share {cores} cores: add --simulated to trust the figures", file=sys.stderr)
    with started_ranks(step, on_host=True) as ranks, track(WARM_UP + steps, "steps", "benchmark pipeline") as bar:
        call_all(ranks, "run_step")
        times = call_all(ranks, "measure_alone") if simulated else None
        bar.advance()
        before = _sent(ranks)
        measured = [_run(ranks, times, bar) for _ in range(steps)]
        sent = _sent(ranks)
        machine = {**ranks[0].call("describe"), "load_before": load}
    sent.subtract(before)
    microbatches = step.workload.microbatches * steps
    links = [
        LinkTraffic(*link, bytes=sent[link] / microbatches, least=least, ratio=sent[link] / microbatches / least)
        for link, least in sorted(least_bytes(step).items())
    ]
    assert set(+sent) == set(least_bytes(step)), "something travels that nothing needs"
    work = _measured_work(measured) if times is None else [_stage_work(alone) for alone in times]
    plan = step.plan
    expected = _busy_shares(step, work)
    busy = busy_shares(measured)
    stages = [
        StageShare(
            layers=list(place.layers),
            exits=list(place.exits),
            forward_seconds=own.forward / 1e6,
            teach_seconds=own.teacher / 1e6,
            exits_seconds=own.exits / 1e6,
            busy=busy[index],
            expected=expected[index],
            planned=1 - plan.stages[index].idle,
        )
        for index, (place, own) in enumerate(zip(step.layout.stages, work, strict=True))
    ]
    return PipelineBenchmark(
        machine=machine,
        model=step.describe(),
        simulated=simulated,
        step_seconds=[_length(one) for one in measured],
        stages=stages,
        links=links,
        efficiency=_mean(busy),
        expected=_mean(expected),
        planned=plan.efficiency,
        reference=plan.reference,
        timeline=_from_zero(sorted(measured, key=_length)[len(measured) // 2]),
    )


def least_bytes(step: ParallelStep) -> dict[Link, int]:
    """Bytes of a microbatch that have to cross each link.

    That is h where the next layer is on another stage, the tap of each exit that is hosted elsewhere, and each verdict
    of a teacher: ids and log-probabilities of its kept tokens.
    """
    workload, layout = step.workload, step.layout
    hidden = workload.tokens * step.architecture.hidden_size * workload.itemsize
    least: Counter[Link] = Counter()
    for index, stage in enumerate(layout.stages):
        if stage.layers and stage.layers[0] > 1:
            least[layout.owner(stage.layers[0] - 1), index, False] += hidden
        for layer in stage.exits:
            if layer not in stage.layers:
                least[layout.owner(layer), index, False] += hidden
        if workload.top_k and stage.exits and index != layout.last_layered:
            least[layout.last_layered, index, True] += 2 * workload.tokens * workload.top_k * VERDICT_ITEMSIZE
    return dict(least)


def busy_shares(measured: Steps) -> list[float]:
    """Of each stage, the share in which it computed of the time between a step's first forward and its end.

    The optimizer comes after that, and takes no other time than without a pipeline.
    """
    total = sum(map(_length, measured))
    stages = range(len(measured[0]))
    computed = [
        sum(span.end - span.start for one in measured for span in one[index] if _busy(span)) for index in stages
    ]
    return [seconds / total for seconds in computed]


def _run(ranks: Sequence[Worker], times: Any, bar: Progress) -> list[list[Span]]:
    answers = call_all(ranks, "run_step") if times is None else call_all(ranks, "run_waiting", times)
    bar.advance()
    return [[Span(*span) for span in answer["spans"]] for answer in answers]


def _sent(ranks: Sequence[Worker]) -> Counter[Link]:
    """Bytes over each link so far."""
    return Counter({tuple(link[:3]): link[4] for links in call_all(ranks, "traffic") for link in links})


def _measured_work(measured: Steps) -> list[StageWork]:
    """Mean work of each stage on a microbatch."""
    found = []
    for index in range(len(measured[0])):
        sums = dict.fromkeys(BUSY, 0.0)
        for span in (span for one in measured for span in one[index] if _busy(span)):
            sums[span.kind] += span.end - span.start
        count = len(measured) * len({span.microbatch for span in measured[0][index]})
        found.append(_stage_work({kind: seconds / count for kind, seconds in sums.items()}))
    return found


def _stage_work(seconds: dict[str, float]) -> StageWork:
    """In microseconds."""
    forward, teacher, exits = (round(1e6 * seconds[kind]) for kind in BUSY)
    return StageWork(forward, teacher, exits)


def _busy_shares(step: ParallelStep, work: Sequence[StageWork]) -> list[float]:
    """As the plan's simulation has them, for this work."""
    workload = step.workload
    return [1 - idle for idle in idle_shares(step.layout, work, workload.microbatches, distillation=workload.top_k > 0)]


def _busy(span: Span) -> bool:
    return span.kind in BUSY


def _start(one: Sequence[Sequence[Span]]) -> float:
    return min(span.start for spans in one for span in spans if span.kind == "forward")


def _length(one: Sequence[Sequence[Span]]) -> float:
    """Seconds from the first forward of a step to the end of the last thing that a stage did."""
    return max(span.end for spans in one for span in spans) - _start(one)


def _from_zero(one: Sequence[Sequence[Span]]) -> list[list[Span]]:
    start = _start(one)
    return [[Span(s.kind, s.microbatch, max(0.0, s.start - start), s.end - start) for s in spans] for spans in one]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
