"""Conversion against copying the same bytes; ``TMPDIR`` names a directory on the disk to measure."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import AddOption, Result, median_of, run, take_turns
from benchmarks.models import describe_model, model_directory
from benchmarks.processes import megatron_ee_command, run_processes
from megatron_ee.commands import at_least

DESCRIPTION = """Time megatron-ee convert, from a Hugging Face directory to a parallel checkpoint and back, against cp
with fsync and against SHA-256 of the same bytes on all CPUs: a conversion writes them all to the disk and hashes them.
Each begins with files that are not in the page cache. What starting the command costs is measured with --dry-run, and
left out. The tensors that come back must be those that went in."""
COLUMNS = (
    ("work", "work", ""),
    ("seconds", "seconds", ",.2f"),
    ("mb_per_second", "MB/s", ",.0f"),
    ("against_copy", "/ cp", ".2fx"),
    ("against_copy_and_hash", "/ (cp + SHA-256)", ".2fx"),
    ("peak_mb", "peak MB", ",.0f"),
)
TO_PARALLEL, TO_HF, COPY, HASH, START = "HF to parallel", "parallel to HF", "cp and fsync", "SHA-256", "start"
BLOCK = 16 * 2**20


def add_options(add: AddOption) -> None:
    """This benchmark's own."""
    add("--tensor", "tensor-parallel size of the parallel checkpoint", type=at_least(1), default=2, metavar="N")
    add("--pipeline", "its number of stages", type=at_least(1), default=2, metavar="N")


def measure(options: argparse.Namespace, directory: Path) -> Result:
    """Compare, in turns."""
    model = model_directory(options, directory, "bfloat16")
    layout = ["--tensor", str(options.tensor), "--pipeline", str(options.pipeline)]
    parallel, back = directory / "parallel", directory / "back"

    def convert(source: Path, target: Path, to: str, *more: str) -> dict[str, float]:
        shutil.rmtree(target, ignore_errors=True)
        drop_from_cache(source)
        arguments = ["--input", str(source), "--output", str(target), "--to", to, *more]
        ended = run_processes(megatron_ee_command("convert", *arguments))
        return {"seconds": ended.seconds, "peak": ended.peak_memory[0]}

    works: dict[str, Callable[[], dict[str, float]]] = {
        START: lambda: convert(model, parallel, "parallel", "--dry-run", *layout),
        COPY: lambda: timed(lambda: copy(model, directory / "copy"), model),
        HASH: lambda: timed(lambda: hash_files(model), model),
        TO_PARALLEL: lambda: convert(model, parallel, "parallel", *layout),
        TO_HF: lambda: convert(parallel, back, "hf"),
    }
    found = take_turns(works, options.repeats, warm_up=0)  # the page cache is cold on purpose
    before, after = digests(model), digests(back)
    if before != after:
        changed = sorted(name for name in before | after if before.get(name) != after.get(name))
        raise RuntimeError(f"conversion there and back changed {len(changed)} tensors, such as {changed[0]}")
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    elapsed = {name: median_of(each, "seconds") for name, each in found.items()}
    rows: list[dict[str, Any]] = []
    for name, rounds in found.items():
        converts = name in (TO_PARALLEL, TO_HF)
        net = max(elapsed[name] - elapsed[START], 1e-3) if converts else elapsed[name]
        row = {"work": name, "seconds": net, "rounds": [each["seconds"] for each in rounds]}
        if name != START:
            row["mb_per_second"] = size / net / 1e6
        if converts:
            row["against_copy"] = net / elapsed[COPY]
            row["against_copy_and_hash"] = net / (elapsed[COPY] + elapsed[HASH])
        if "peak" in rounds[0]:
            row["peak_mb"] = max(each["peak"] for each in rounds) / 1e6
        rows.append(row)
    settings = describe_model(options, model)
    settings |= {"tensor": options.tensor, "pipeline": options.pipeline, "bytes": size, "same_tensors": len(before)}
    limits = {"copy_MB_per_second": size / elapsed[COPY] / 1e6, "hash_MB_per_second": size / elapsed[HASH] / 1e6}
    return Result("Conversion", settings, COLUMNS, limits, rows)


def timed(work: Callable[[], object], source: Path) -> dict[str, float]:
    """Seconds of ``work`` on files that are not in the page cache."""
    drop_from_cache(source)
    started = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - started}


def copy(source: Path, target: Path) -> None:
    """``cp -r``, and wait until the copy is on disk, as a conversion does."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.rglob("*"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def hash_files(directory: Path) -> None:
    """SHA-256 of every 16 MiB of the weights, on all CPUs."""
    places = [
        (path, start) for path in directory.glob("*.safetensors") for start in range(0, path.stat().st_size, BLOCK)
    ]

    def work(place: tuple[Path, int]) -> bytes:
        with place[0].open("rb", buffering=0) as file:
            file.seek(place[1])
            return hashlib.sha256(file.read(BLOCK)).digest()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(work, places))


def drop_from_cache(directory: Path) -> None:
    """Have the page cache forget the files below ``directory``, as far as it will."""
    os.sync()  # what is not on disk yet stays
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def digests(directory: Path) -> dict[str, str]:
    """By name: dtype, shape and SHA-256 of the bytes of each tensor in a Hugging Face directory."""
    import torch
    from safetensors import safe_open

    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                sha256 = hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()
                found[name] = f"{tensor.dtype} {list(tensor.shape)} {sha256}"
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return run("convert", DESCRIPTION, add_options, measure, argv, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
