"""Each rank's memory in real steps against the plan's. This process imports no torch and stays small."""

from __future__ import annotations

import dataclasses
import statistics

from megatron_ee.benchmark.ranks import ParallelStep, started_ranks
from megatron_ee.benchmark.results import MemoryBenchmark, RankMemory
from megatron_ee.benchmark.worker import call_all
from megatron_ee.progress import track

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Of glibc: freed blocks from 1 MiB go back to the system at once. Otherwise it keeps some of up to 32 MiB each."""


def benchmark_memory(step: ParallelStep, *, steps: int, resident: bool = False) -> MemoryBenchmark:
    """Run ``steps`` tuning steps on all ranks and read what each held at its peak, beyond the libraries at the start.

    Args:
        steps: the first one makes the optimizer's state.
        resident: without an accelerator, count what the allocator keeps of freed memory too. Otherwise it is told to
            give that back, so that what is in use counts, as on a GPU.

    Raises:
        UserError: a process did not survive, or there are fewer devices than ranks.
    """
    environment = {} if resident else GIVE_BACK
    with (
        started_ranks(step, on_host=False, environment=environment) as ranks,
        track(steps, "steps", "benchmark memory") as bar,
    ):
        seconds, losses = [], []
        for _ in range(steps):
            answers = call_all(ranks, "run_step")
            seconds.append(max(answer["seconds"] for answer in answers))
            losses.append(answers[0]["losses"])
            bar.advance()
        held = call_all(ranks, "memory")
        machine = ranks[0].call("describe")
    workload = dataclasses.replace(step.workload, graph_tokens=held[0]["graph_tokens"])
    plan, tensor = dataclasses.replace(step, workload=workload).plan, workload.tensor
    rows = []
    for number, memory in enumerate(held):
        stage = number // tensor
        planned, measured = plan.stages[stage].memory, memory["peak"] - memory["before"]
        rows.append(RankMemory(stage, number % tensor, memory["before"], measured, planned, measured / planned.total))
    return MemoryBenchmark(
        machine=machine,
        model=step.describe(),
        resident=resident,
        ranks=rows,
        together=sum(memory["peak"] for memory in held),
        step_seconds=statistics.median(seconds),
        losses=losses,
    )
