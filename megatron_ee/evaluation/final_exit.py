"""The final exit's results for validation: its loss and top-1 tokens, computed once and cached.

Tuning loads no layers beyond the deepest exit. So these results are computed before tuning, and the layers are freed
again.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee import platform
from megatron_ee.checkpoint.digest import cache_directory
from megatron_ee.checkpoint.safetensors_file import read_header, read_into, write_safetensors
from megatron_ee.config.architecture import outputs_digest
from megatron_ee.data.loader import ValidationWindows
from megatron_ee.errors import CheckpointError
from megatron_ee.model.metrics import FinalStats
from megatron_ee.progress import track
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.schedule import Microbatch, Pipeline

VERSION = 1
"""Part of the cache key. Increase it if a new version computes other results from the same model and data."""


@dataclass(frozen=True)
class FinalExit:
    """Results of the final exit on this data-parallel rank's validation windows, in their order.

    Attributes:
        loss: ``[windows, seq]`` float32, nats.
        top1: ``[windows, seq]`` int64.
    """

    loss: Tensor
    top1: Tensor

    def take(self, start: int, count: int) -> FinalStats:
        """Windows ``start`` to ``start + count`` as ``[tokens]``, sequence-major as hidden states are."""
        part = slice(start, start + count)
        return FinalStats(self.loss[part].t().reshape(-1), self.top1[part].t().reshape(-1))


def final_exit(
    full: FullModel, digest: str, windows: ValidationWindows, batch_size: int, chunk_tokens: int
) -> FinalExit:
    """Return the final exit's results from the cache, or compute and cache them. Every rank calls this.

    The cache key consists of the backbone's hash and settings, the data and the dtype. Results with other layouts,
    batch sizes and chunk sizes differ only by rounding, so they share an entry.

    Args:
        full: all layers. Its ``interrupt`` is checked between microbatches.
        digest: the backbone's hash.
        windows: validation windows; each data-parallel rank takes its share.
        batch_size: windows per pass.
        chunk_tokens: tokens whose logits exist at a time.

    Raises:
        CheckpointError: the model's files cannot be read.
        Interrupted: one of the ranks received a signal; raised on all ranks.
    """
    groups = full.setup.groups
    rank, size = groups.data.rank(), groups.data.size()
    settings = outputs_digest(full.model.architecture)
    weights = () if full.model.rounding == "none" else (full.model.rounding,)
    key = (VERSION, digest, settings, windows.fingerprint, str(full.setup.dtype), rank, size, *weights)
    path = cache_directory() / "final-exit" / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.safetensors"
    shape = (len(range(rank, len(windows), size)), windows.sequence_length)
    cached = _read(path, shape)
    if all(groups.gather(cached is not None)) and cached is not None:
        return cached
    result = _compute(full, windows, batch_size, chunk_tokens)
    if groups.pipeline.rank() == groups.tensor.rank() == 0:
        _write(path, result)
    return result


def _compute(full: FullModel, windows: ValidationWindows, batch_size: int, chunk_tokens: int) -> FinalExit:
    groups, stage = full.setup.groups, full.stage
    rank, size = groups.data.rank(), groups.data.size()
    pipeline = Pipeline(stage, full.layout, ())
    share = len(range(rank, len(windows), size))
    loss = torch.empty(share, windows.sequence_length, device=platform.device())
    top1 = torch.empty_like(loss, dtype=torch.int64)
    done = 0
    with track(share, "sequences", "final exit on the validation data", enabled=groups.is_main) as bar:

        def passed(micro: Microbatch, teacher: object) -> None:
            nonlocal done
            done += len(micro.batch.tokens)
            bar.advance(len(micro.batch.tokens))

        def at_end(micro: Microbatch, h: Tensor) -> None:
            stats, count = stage.final_statistics(h, micro.labels, chunk_tokens=chunk_tokens), len(micro.batch.tokens)
            loss[done : done + count] = stats.loss.view(-1, count).t()
            top1[done : done + count] = stats.top1.view(-1, count).t()

        length = pipeline.batches_per_run(batch_size, windows.sequence_length)
        check = partial(full.interrupt.check_together, groups)
        for batches in windows.runs(batch_size, rank, size, length=length, check=check):
            pipeline.run(batches, passed, at_end)
    for tensor in (loss, top1):
        dist.broadcast(tensor, group=groups.pipeline, group_src=full.layout.last_layered)
    return FinalExit(loss.cpu(), top1.cpu())


def _read(path: Path, shape: tuple[int, int]) -> FinalExit | None:
    """The cached result; None if there is no usable one."""
    if not path.is_file():
        return None
    try:
        header = read_header(path)
        loss, top1 = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
        read_into(header["loss"], loss)
        read_into(header["top1"], top1)
    except (CheckpointError, KeyError):
        return None
    return FinalExit(loss, top1)


def _write(path: Path, result: FinalExit) -> None:
    """Write the cache. Errors are ignored."""
    with contextlib.suppress(OSError, CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, {"loss": result.loss, "top1": result.top1}, {"format": "pt"})
