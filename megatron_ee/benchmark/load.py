"""Loading a released model against reading its bytes, interleaved. This process imports no torch and stays small."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from megatron_ee.benchmark.results import LoadBenchmark
from megatron_ee.benchmark.shape import shape_of_size
from megatron_ee.benchmark.worker import quiet_enough, start_worker
from megatron_ee.config.architecture import read_architecture
from megatron_ee.progress import track

_PACKAGE = "megatron_ee.benchmark"
WAYS = ("load", "read", "keep", "hash", "sha256")
_POSITIONS = 2048


def benchmark_load(model: Path | None, *, megabytes: int, dtype: str | None, repeats: int) -> LoadBenchmark:
    """Measure loading, reading and hashing of ``model``, or of a random bfloat16 one of about ``megabytes``.

    The first round is not measured: it brings the files into the page cache, so that both read from memory.

    Raises:
        CheckpointError: the model cannot be used.
        UserError: a process did not survive.
    """
    if model is not None:
        read_architecture(model)  # refuses what is no model before anything is started
    load = quiet_enough()
    with tempfile.TemporaryDirectory(prefix="megatron-ee-") as temporary:
        directory = str(model) if model is not None else f"{temporary}/model"
        with start_worker("the machine", f"{_PACKAGE}.machine:machine") as machine:
            described = machine.call("describe")
            if model is None:
                machine.call("make_model", directory, shape_of_size(megabytes, 2), "bfloat16", _POSITIONS)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        with (
            start_worker("loading", f"{_PACKAGE}.loading:loading", directory, dtype, temporary) as worker,
            track(1 + repeats, "rounds", "benchmark load") as bar,
        ):
            what = worker.call("describe")
            for number in range(1 + repeats):
                for way in WAYS:
                    elapsed = worker.call(way)
                    if number > 0:
                        times[way].append(elapsed)
                bar.advance()
    median = {way: statistics.median(times[way]) for way in WAYS}
    return LoadBenchmark(
        machine={**described, "load_before": load},
        model={"path": str(model) if model is not None else None, **what},
        load_seconds=median["load"],
        read_seconds=median["read"],
        keep_seconds=median["keep"],
        hash_seconds=median["hash"],
        load_rate=what["bytes"] / median["load"],
        read_rate=what["bytes"] / median["read"],
        keep_rate=what["bytes"] / median["keep"],
        hash_rate=what["bytes"] / median["hash"],
        sha256_rate=what["buffer"] / median["sha256"],
        load_ratio=median["load"] / median["read"],
        load_keep_ratio=median["load"] / median["keep"],
        hash_ratio=median["hash"] / median["load"],
    )
