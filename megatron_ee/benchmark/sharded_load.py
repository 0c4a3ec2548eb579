"""Loading on tensor-parallel ranks against reading the bytes that each needs. This process imports no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_ee.benchmark import files
from megatron_ee.benchmark.conversion import PIPELINE, RATIO, TENSOR
from megatron_ee.benchmark.memory import GIVE_BACK
from megatron_ee.benchmark.ranks import free_port
from megatron_ee.benchmark.results import ShardedLoad, ShardedLoads
from megatron_ee.benchmark.shape import Shape
from megatron_ee.benchmark.worker import Worker, call_all, start_worker
from megatron_ee.progress import track

CASES = [
    (kind, verified, cold)
    for kind, verified in (("hf", False), ("parallel", False), ("parallel", True))
    for cold in (True, False)
]
"""What is loaded, whether it is verified (a Hugging Face directory has nothing to check against), and from where."""


def measure_loads(shape: Shape, directory: Path, repeats: int, helper: Worker) -> ShardedLoads:
    """Load a Hugging Face directory and a parallel checkpoint on ``TENSOR`` ranks at the same time, cold and warm.

    Args:
        helper: a converter, which makes them.

    Raises:
        UserError: a process did not survive, or the disk is full.
    """
    paths = {"hf": directory / "model", "parallel": directory / "parallel"}
    with track(2 + len(CASES) * repeats, "steps", "benchmark convert, loading") as bar:
        made = helper.call("make_model", str(paths["hf"]), shape)
        bar.advance()
        helper.call("convert", str(paths["hf"]), str(paths["parallel"]), "parallel", TENSOR, PIPELINE)
        bar.advance()
        rows = []
        with started_readers(TENSOR) as ranks:
            for kind, verified, cold in CASES:
                needed = [answer["bytes"] for answer in call_all(ranks, "describe", str(paths[kind]))]
                rounds = []
                for _ in range(repeats):
                    rounds.append(_round(ranks, paths[kind], verified, cold))
                    bar.advance()
                rows.append(_row(kind, verified, cold, needed, rounds))
    for path in paths.values():
        shutil.rmtree(path)
    return ShardedLoads(model=made, tensor=TENSOR, ratio_target=RATIO, loads=rows)


@contextlib.contextmanager
def started_readers(count: int) -> Iterator[list[Worker]]:
    """Ranks that have met; see ``reading.Reading``. Memory that they free goes back, so that each load finds it new."""
    make, port = "megatron_ee.benchmark.reading:reading", free_port()
    with mock.patch.dict(os.environ, GIVE_BACK), contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(start_worker(f"rank {number}", make, number, count, port, wait=False))
            for number in range(count)
        ]
        call_all(workers, "meet")
        yield workers


def _round(ranks: Sequence[Worker], path: Path, verified: bool, cold: bool) -> dict[str, Any]:
    """Each way once: what every rank measured, and the largest (cold) or smallest share that was in the page cache."""
    ways: dict[str, tuple[str, tuple[bool, ...]]] = {
        "load": ("load", (verified,)),
        "read": ("read", (True, verified)),
        "reuse": ("read", (False, verified)),
    }
    if not cold:
        call_all(ranks, "read", str(path), False, False)
    answers: dict[str, Any] = {}
    shares = []
    for way, (method, options) in ways.items():
        shares.append(files.drop_cache(path) if cold else files.resident_share(path))
        answers[way] = call_all(ranks, method, str(path), *options)
    return {**answers, "resident": max(shares) if cold else min(shares)}


def _row(kind: str, verified: bool, cold: bool, needed: list[int], rounds: Sequence[dict[str, Any]]) -> ShardedLoad:
    # The slowest rank counts: the others wait for it.
    times = {way: [max(rank["seconds"] for rank in each[way]) for each in rounds] for way in ("load", "read", "reuse")}
    median = {way: statistics.median(seconds) for way, seconds in times.items()}
    last = rounds[-1]["load"]
    return ShardedLoad(
        format=kind,
        verified=verified,
        cold=cold,
        resident=statistics.median(each["resident"] for each in rounds),
        load_seconds=times["load"],
        read_seconds=times["read"],
        reuse_seconds=times["reuse"],
        ratio=median["load"] / median["read"],
        reuse_ratio=median["load"] / median["reuse"],
        rate=sum(needed) / median["load"],
        needed=needed,
        read=[rank["read"] for rank in last],
        read_ratio=max(rank["read"] / count for rank, count in zip(last, needed, strict=True)),
        disk=sum(rank["disk"] for rank in last),
    )
