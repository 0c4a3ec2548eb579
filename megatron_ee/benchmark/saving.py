"""How long tuning stands still for a save, on the spot and in the background. This process imports no torch."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.benchmark.worker import quiet_enough, start_worker
from megatron_ee.progress import track

PRODUCTS = 20  # measured per round with nothing else running


@dataclass(frozen=True)
class SavingBenchmark:
    """Times are medians in seconds.

    Attributes:
        state: what is saved: ``bytes`` and ``tensors``.
        synchronous_seconds: that tuning stands still for a save on the spot.
        asynchronous_seconds: the same for one in the background.
        first_seconds: the same for the first of these, which makes the memory that the copies are kept in.
        writing_seconds: that the save then takes in the background, while products of matrices are computed.
        copy_seconds: of copying the state into host memory that is there: the least that standing still can be.
        disk_seconds: of writing the same bytes to one file and fsyncing it, without a checksum.
        ratio: time to stand still on the spot over that in the background.
        copy_ratio: time to stand still in the background over copying.
        disk_ratio: a save on the spot over writing the same bytes.
        slowdown: time of a product of matrices beside a save in the background, over that without one.
    """

    machine: dict[str, Any]
    state: dict[str, Any]
    synchronous_seconds: float
    asynchronous_seconds: float
    first_seconds: float
    writing_seconds: float
    copy_seconds: float
    disk_seconds: float
    ratio: float
    copy_ratio: float
    disk_ratio: float
    slowdown: float


def benchmark_saving(directory: Path | None = None, *, megabytes: int = 500, repeats: int = 5) -> SavingBenchmark:
    """Save a random state of about ``megabytes`` again and again, each way in turn.

    Args:
        directory: where to write; None takes the system's place for temporary files, which may be in memory.

    Raises:
        CheckpointError: nothing can be written there.
        UserError: the process did not survive.
    """
    load = quiet_enough()
    times: dict[str, list[float]] = {}

    def note(name: str, elapsed: float) -> None:
        times.setdefault(name, []).append(elapsed)

    with (
        tempfile.TemporaryDirectory(prefix="megatron-ee-", dir=directory) as temporary,
        start_worker("saving", "megatron_ee.benchmark.saves:saves", temporary, megabytes) as worker,
        track(repeats, "rounds", "benchmark saving") as bar,
    ):
        what = worker.call("describe")
        first = worker.call("save", True)["stopped"]
        worker.call("copy")
        for _ in range(repeats):
            note("synchronous", worker.call("save", False)["stopped"])
            for name, elapsed in worker.call("save", True).items():
                note(name, elapsed)
            for name in ("copy", "write"):
                note(name, worker.call(name))
            note("alone", statistics.median(worker.call("product") for _ in range(PRODUCTS)))
            bar.advance()
    median = {name: statistics.median(elapsed) for name, elapsed in times.items()}
    return SavingBenchmark(
        machine={**what["machine"], "load_before": load},
        state={"bytes": what["bytes"], "tensors": what["tensors"]},
        synchronous_seconds=median["synchronous"],
        asynchronous_seconds=median["stopped"],
        first_seconds=first,
        writing_seconds=median["writing"],
        copy_seconds=median["copy"],
        disk_seconds=median["write"],
        ratio=median["synchronous"] / median["stopped"],
        copy_ratio=median["stopped"] / median["copy"],
        disk_ratio=median["synchronous"] / median["write"],
        slowdown=median["product"] / median["alone"],
    )
