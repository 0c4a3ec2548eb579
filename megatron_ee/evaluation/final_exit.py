"""The final exit's share of validation: its loss and top-1 tokens, computed once and cached.

Tuning loads no layer beyond the deepest exit, so this runs before it, through all layers, and frees them again.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ee.checkpoint.digest import cache_directory
from megatron_ee.checkpoint.loading import ReleasedModel, load_backbone
from megatron_ee.checkpoint.safetensors_file import read_header, read_into, write_safetensors
from megatron_ee.data.loader import Batch, ValidationWindows
from megatron_ee.errors import CheckpointError
from megatron_ee.model.metrics import FinalStats
from megatron_ee.model.setup import ModelSetup
from megatron_ee.model.stage import Stage
from megatron_ee.progress import track
from megatron_ee.tuning.step import to_device


@dataclass(frozen=True)
class FinalExit:
    """The final exit on this data-parallel rank's validation windows, in their order.

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
    setup: ModelSetup, model: ReleasedModel, digest: str, windows: ValidationWindows, batch_size: int, chunk_tokens: int
) -> FinalExit:
    """From the cache, by the hashes of backbone and data, or computed and put there.

    Args:
        digest: the backbone's hash.
        batch_size: windows at a time.
        chunk_tokens: tokens whose logits exist at one time.

    Raises:
        CheckpointError: the model's files cannot be read.
    """
    rank, size = setup.groups.data.rank(), setup.groups.data.size()
    key = (digest, windows.fingerprint, str(setup.dtype), rank, size)
    path = cache_directory() / "final-exit" / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.safetensors"
    shape = (len(range(rank, len(windows), size)), windows.sequence_length)
    cached = _read(path, shape)
    if cached is not None:
        return cached
    layers = range(1, model.architecture.num_layers + 1)
    stage = Stage(setup, layers, (), final_exit=True)
    load_backbone(stage, model)
    losses, tokens = [], []
    with track(shape[0], "sequences", "final exit on the validation data") as bar:
        for batch in windows.batches(batch_size, rank, size):
            loss, top1 = _run(stage, batch, chunk_tokens)
            losses.append(loss)
            tokens.append(top1)
            bar.advance(len(batch.tokens))
    result = FinalExit(torch.cat(losses), torch.cat(tokens))
    _write(path, result)
    return result


def _run(stage: Stage, batch: Batch, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """Loss and top-1 of a batch, ``[batch, seq]``."""
    labels, _ = to_device(batch)
    with torch.no_grad():
        h = stage.backbone.embed(batch.tokens.to(labels.device))
        h, _ = stage.run_layers(h, stage.backbone.positions(0, batch.tokens.shape[1]), to_end=True)
    stats = stage.final_statistics(h, labels, chunk_tokens=chunk_tokens)
    count = len(batch.tokens)
    return stats.loss.view(-1, count).t().cpu(), stats.top1.view(-1, count).t().cpu()


def _read(path: Path, shape: tuple[int, int]) -> FinalExit | None:
    """The cached result; None where there is none that can be used."""
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
    """A cache that cannot be written is done without."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(
            temporary, {"loss": result.loss.contiguous(), "top1": result.top1.contiguous()}, {"format": "pt"}
        )
        os.replace(temporary, path)
    except (OSError, CheckpointError):
        temporary.unlink(missing_ok=True)
