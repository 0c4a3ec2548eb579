"""Conversions, each in a process of its own, against copying and hashing the same bytes. Imports no torch."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_ee.benchmark import files
from megatron_ee.benchmark.results import Conversion, Direction
from megatron_ee.benchmark.shape import Shape
from megatron_ee.benchmark.worker import Worker, start_worker
from megatron_ee.progress import track

TENSOR, PIPELINE = 2, 2
"""Layout that the parallel checkpoint is cut for."""
RATIO = 1.3
"""At most this many times as long as the plain work that it is compared with."""
MEMORY = 2**30
"""Bytes that a conversion holds at most beyond the largest tensor."""


def start_converter() -> AbstractContextManager[Worker]:
    """A process whose memory nothing has used yet; see ``converting.Converting``."""
    return start_worker("the conversion", "megatron_ee.benchmark.converting:converting")


def measure_conversion(shape: Shape, directory: Path, repeats: int, helper: Worker) -> Conversion:
    """Convert a model to a parallel checkpoint and back; before each, copy and hash what is read.

    Either begins with a page cache that does not hold the files. Each round ends with a comparison of all tensors; what
    came back is what the next one starts from, so that no more than two copies are on disk.

    Args:
        helper: another converter, for what is not measured.

    Raises:
        UserError: a process did not survive, or the disk is full.
        RuntimeError: the model came back changed.
    """
    model, parallel, back = (directory / name for name in ("model", "parallel", "back"))
    measured: dict[str, list[dict[str, Any]]] = {"parallel": [], "hf": []}
    with track(2 + 5 * repeats, "steps", "benchmark convert") as bar:
        made = helper.call("make_model", str(model), shape)
        bar.advance()
        before = helper.call("digests", str(model))
        bar.advance()
        for _ in range(repeats):
            for to, source, target in (("parallel", model, parallel), ("hf", parallel, back)):
                copied = _copy(source, directory / "copy")
                bar.advance()
                measured[to].append({**copied, **_convert(source, target, to)})
                bar.advance()
                shutil.rmtree(source)
            check_same(before, helper.call("digests", str(back)))
            bar.advance()
            back.rename(model)
        shutil.rmtree(model)
    both = [
        {name: first[name] + second[name] for name in ("seconds", "copy", "hash")}
        for first, second in zip(*measured.values(), strict=True)
    ]
    return Conversion(
        model=made,
        layout={"tensor": TENSOR, "pipeline": PIPELINE},
        directions=[_direction(to, made["bytes"], rounds) for to, rounds in measured.items()],
        ratio=_ratio(both),
        ratio_target=RATIO,
        memory_target=made["largest_tensor"] + MEMORY,
        identical=len(before),
    )


def _copy(source: Path, copy: Path) -> dict[str, float]:
    resident = files.drop_cache(source)
    times = [time.perf_counter()]
    for work in (lambda: files.copy_directory(source, copy), lambda: files.hash_directory(copy)):
        work()
        times.append(time.perf_counter())
    shutil.rmtree(copy)
    return {"copy": times[1] - times[0], "hash": times[2] - times[1], "copy_resident": resident}


def _convert(source: Path, target: Path, to: str) -> dict[str, float]:
    with start_converter() as worker:
        resident = files.drop_cache(source)
        layout = (TENSOR, PIPELINE) if to == "parallel" else ()
        result: dict[str, float] = worker.call("convert", str(source), str(target), to, *layout)
    return {**result, "resident": resident}


def check_same(before: dict[str, str], after: dict[str, str]) -> None:
    """Raises RuntimeError: a tensor, or ``config.json``, is missing, new, or not what it was."""
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise RuntimeError(f"after conversion there and back {len(changed)} tensors differ, such as {changed[0]}")


def _direction(to: str, size: int, rounds: Sequence[dict[str, Any]]) -> Direction:
    return Direction(
        to=to,
        seconds=[each["seconds"] for each in rounds],
        copy_seconds=[each["copy"] for each in rounds],
        hash_seconds=[each["hash"] for each in rounds],
        ratio=_ratio(rounds),
        rate=size / statistics.median(each["seconds"] for each in rounds),
        libraries=max(each["libraries"] for each in rounds),
        memory=max(each["memory"] for each in rounds),
        resident=max(max(each["resident"], each["copy_resident"]) for each in rounds),
    )


def _ratio(rounds: Sequence[dict[str, float]]) -> float:
    ours = statistics.median(each["seconds"] for each in rounds)
    return ours / statistics.median(each["copy"] + each["hash"] for each in rounds)
