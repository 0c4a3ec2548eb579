"""One rank that loads its part of a model, against reading the same bytes of the same files and no more."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ee.benchmark.machine import seconds
from megatron_ee.benchmark.ranks import launcher_environment
from megatron_ee.checkpoint.digest import hash_workers
from megatron_ee.checkpoint.hf_directory import HFDirectory
from megatron_ee.checkpoint.loading import READERS, SavedModel, load_backbone, open_model
from megatron_ee.checkpoint.manifest import MANIFEST, Box, intersect
from megatron_ee.checkpoint.names import backbone_sources, blocks
from megatron_ee.checkpoint.safetensors_file import TensorEntry, read_header, tensor_bytes
from megatron_ee.config.untrusted import open_regular, read_exactly, read_json
from megatron_ee.model.setup import build_setup
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.groups import Groups, process_groups

PIECE = 4 * 2**20
"""Bytes that plain reading asks for at a time, at most: large enough for system calls not to count."""
Run = tuple[Path, int, int]
"""A file, and the first byte and the number of bytes of it that are wanted."""


@contextlib.contextmanager
def reading(number: int, world_size: int, port: int) -> Iterator[Reading]:
    """For a worker: the object below, on the host also where there is an accelerator."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= launcher_environment(number, world_size, port)
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        yield Reading(world_size, stack)


@dataclass
class Reading:
    """Every method is called on all ranks at the same time, after ``meet``.

    Attributes:
        world_size: tensor-parallel size.
        stack: closes the process groups.
        runs: by directory, what this rank needs of its files.
    """

    world_size: int
    stack: contextlib.ExitStack
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def meet(self) -> None:
        """Form the process groups."""
        self.groups: Groups = self.stack.enter_context(process_groups(self.world_size))

    def describe(self, directory: str) -> dict[str, int]:
        """Find the bytes that this rank needs of a directory: ``bytes``, in ``runs`` that do not touch."""
        model = open_model(directory, verify=False)
        boxes = {(block.name, block.offset, tuple(block.tensor.shape)) for block in self._blocks(model)}
        self.runs[directory] = join_runs(needed_runs(Path(directory), boxes))
        return {"bytes": sum(count for _, _, count in self.runs[directory]), "runs": len(self.runs[directory])}

    def load(self, directory: str, verify: bool) -> dict[str, Any]:
        """As a run starts: open and check the model, allocate this rank's part, fill it. Returns as ``_measured``."""
        kept: list[Stage] = []

        def work() -> None:
            model = open_model(directory, verify=verify)
            kept.append(self._stage(model))
            load_backbone(kept[0], model)

        return _measured(work)

    def read(self, directory: str, keep: bool, hashed: bool) -> dict[str, Any]:
        """Read the bytes that this rank needs, as many files' parts at a time as loading does.

        Args:
            keep: into new memory for all of them; otherwise into one small buffer per thread, so that they are gone.
            hashed: take their SHA-256 too, with as many threads as loading does.

        Returns:
            As ``_measured``.
        """
        kept: list[torch.Tensor] = []
        return _measured(lambda: read_runs(self.runs[directory], keep=keep, hashed=hashed, kept=kept))

    def _stage(self, model: SavedModel) -> Stage:
        stored = next(iter(model.weights.values())).dtype
        setup = build_setup(model.architecture, stored, self.groups)
        return Stage(setup, range(1, model.architecture.num_layers + 1), [], final_exit=True)

    def _blocks(self, model: SavedModel) -> Iterator[Any]:
        tensor = self.groups.tensor
        for parameter, source in backbone_sources(self._stage(model).backbone):
            yield from blocks(parameter, source, model.architecture, tensor.rank(), tensor.size())


def _measured(work: Callable[[], None]) -> dict[str, Any]:
    """``seconds`` that ``work`` took, bytes that this process ``read`` meanwhile, and those that came from ``disk``."""
    before = _bytes_read()
    elapsed = seconds(work)
    read, disk = (after - first for after, first in zip(_bytes_read(), before, strict=True))
    return {"seconds": elapsed, "read": read, "disk": disk}


def _bytes_read() -> tuple[int, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = {name: int(count) for name, _, count in (line.partition(":") for line in lines)}
    return counts["rchar"], counts["read_bytes"]


def needed_runs(directory: Path, boxes: set[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> Iterator[Run]:
    """Where the files of a Hugging Face directory or a parallel checkpoint hold these boxes (name, offset, shape)."""
    places = _places(directory)
    for name, offset, shape in boxes:
        for piece, entry in places[name]:
            common = intersect((offset, shape), piece)
            if common is not None:
                yield from _runs_of(entry, [a - b for a, b in zip(common[0], piece[0], strict=True)], common[1])


def _places(directory: Path) -> dict[str, list[tuple[Box, TensorEntry]]]:
    """By tensor, the boxes of it that lie in files, and where."""
    if not (directory / MANIFEST).is_file():
        tensors = HFDirectory.open(directory).tensors
        return {name: [(((0,) * len(entry.shape), entry.shape), entry)] for name, entry in tensors.items()}
    manifest = read_json(directory / MANIFEST)
    headers = {name: read_header(directory / name) for name in manifest["files"]}
    return {
        name: [((piece["offset"], piece["shape"]), headers[piece["file"]][piece["name"]]) for piece in tensor["pieces"]]
        for name, tensor in manifest["tensors"].items()
    }


def _runs_of(entry: TensorEntry, inside: Sequence[int], shape: Sequence[int]) -> Iterator[Run]:
    """The contiguous runs of a file that hold the box of ``shape`` at ``inside`` of one of its tensors."""
    pitches = [math.prod(entry.shape[dim + 1 :]) * entry.dtype.itemsize for dim in range(len(shape))]
    cut = max((dim for dim in range(len(shape)) if shape[dim] != entry.shape[dim]), default=0)
    first = entry.offset + sum(index * pitch for index, pitch in zip(inside, pitches, strict=True))
    count = math.prod(shape[cut:]) * entry.dtype.itemsize
    for index in itertools.product(*(range(extent) for extent in shape[:cut])):
        yield entry.path, first + sum(step * pitch for step, pitch in zip(index, pitches, strict=False)), count


def join_runs(runs: Iterator[Run]) -> list[Run]:
    """The same bytes in the order of the files, runs that touch made one."""
    joined: list[Run] = []
    for path, start, count in sorted(runs):
        if joined and joined[-1][0] == path and sum(joined[-1][1:]) == start:
            joined[-1] = (path, joined[-1][1], joined[-1][2] + count)
        else:
            joined.append((path, start, count))
    return joined


def read_runs(runs: Sequence[Run], *, keep: bool, hashed: bool, kept: list[torch.Tensor]) -> None:
    """Read all of ``runs``; with ``keep`` they end up one after the other in ``kept[0]``, uint8."""
    if keep:
        kept.append(torch.empty(sum(count for _, _, count in runs), dtype=torch.uint8))
    memory = tensor_bytes(kept[0]) if keep else None
    jobs, lock = _jobs(runs), threading.Lock()

    def work() -> None:
        buffer, digest = tensor_bytes(torch.empty(PIECE, dtype=torch.uint8)), hashlib.sha256()
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            place, parts = job
            with open_regular(parts[0][0]) as fd:
                for path, start, count in parts:
                    target = buffer[:count] if memory is None else memory[place : place + count]
                    read_exactly(fd, target, start, path)
                    if hashed:
                        digest.update(target)
                    place += count

    threads = max(READERS, hash_workers()) if hashed else READERS
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()


def _jobs(runs: Sequence[Run]) -> Iterator[tuple[int, list[Run]]]:
    """Parts of a file of about ``PIECE`` wanted bytes each, and where they go in a memory for all."""
    place = total = 0
    parts: list[Run] = []
    for path, start, count in runs:
        for done in range(0, count, PIECE):
            part = min(PIECE, count - done)
            if parts and (parts[0][0] != path or total + part > PIECE):
                yield place, parts
                place, total, parts = place + total, 0, []
            parts.append((path, start + done, part))
            total += part
    if parts:
        yield place, parts
