"""Tokens of the run's training data that exits and their gates are fitted on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ee import platform
from megatron_ee.config.schema import RunConfig
from megatron_ee.data.loader import Batch, MicrobatchStream, PackedBlend
from megatron_ee.errors import DataError
from megatron_ee.exits.fit import HELD_OUT_MOST, PER_FEATURE
from megatron_ee.parallel.groups import Groups
from megatron_ee.tuning.interrupt import Interrupt

HELD_OUT_SHARE, HELD_OUT_LEAST = 16, 1024

Steps = list[list[Batch]]
"""This rank's microbatches of some global batches."""


@dataclass(frozen=True)
class Tokens:
    """What exits are fitted and measured on. The two parts have different tokens unmasked.

    Attributes:
        fitted: global batches to fit on.
        held_out: global batches to measure on.
        num_fitted: unmasked tokens of ``fitted``, over all data-parallel ranks.
        num_held_out: of ``held_out``.
    """

    fitted: Steps
    held_out: Steps
    num_fitted: int
    num_held_out: int


def read_tokens(
    config: RunConfig, blend: PackedBlend, features: int, groups: Groups, interrupt: Interrupt, start: int = 0
) -> Tokens:
    """Tokens of the training data from sequence ``start`` on, by whole global batches: ``fit.tokens``, or at most one
    epoch.

    ``auto`` is 16 tokens for each of ``features``.

    The last sequences of them, about a sixteenth of the tokens, are held out. Of a single sequence it is the last
    quarter. The same tokens in every layout.

    Raises:
        DataError: all tokens are masked.
    """
    tuning = config.tuning
    wanted = PER_FEATURE * features if config.fit.tokens == "auto" else config.fit.tokens
    stream = MicrobatchStream(
        blend, tuning.micro_batch_size, tuning.global_batch_size, groups.data.rank(), groups.data.size(), start
    )
    steps: Steps = []
    counts: list[int] = []  # unmasked tokens of each sequence, over all ranks
    end = start + sum(blend.samples_per_epoch)
    while not steps or (sum(counts) < wanted and stream.consumed + tuning.global_batch_size <= end):
        interrupt.check_together(groups)
        first = stream.consumed
        steps.append(stream.step())
        own = torch.zeros(tuning.global_batch_size, dtype=torch.int64)
        for batch in steps[-1]:
            own[batch.sequences.start - first : batch.sequences.stop - first] = batch.mask.sum(dim=1)
        own = own.to(platform.device())
        dist.all_reduce(own, group=groups.data)
        counts += own.tolist()
    total = sum(counts)
    first, position = _cut(counts, config.data.sequence_length)
    fitted, held_out = (
        [[_masked(batch, start + first, position, held) for batch in step] for step in steps] for held in (False, True)
    )
    held = [sum(batch.num_tokens for step in held_out for batch in step)]
    num_held_out = torch.tensor(held, device=platform.device())
    dist.all_reduce(num_held_out, group=groups.data)
    if total == int(num_held_out):
        raise DataError("data.train: too few unmasked tokens to fit exits on; give more data, or use init: copy")
    size = tuning.global_batch_size
    last = first if position else first - 1
    return Tokens(fitted[: last // size + 1], held_out[first // size :], total - int(num_held_out), int(num_held_out))


def _cut(counts: Sequence[int], sequence_length: int) -> tuple[int, int]:
    """The sequence and the position in it where the held-out tokens begin.

    Args:
        counts: unmasked tokens of each sequence.
        sequence_length: tokens of each.
    """
    total = sum(counts)
    wanted = min(max(HELD_OUT_LEAST, min(HELD_OUT_MOST, total // HELD_OUT_SHARE)), total // 4)
    used = [number for number, count in enumerate(counts) if count]
    if len(used) < 2:
        return (used or [0])[0], 3 * sequence_length // 4
    held, first = 0, len(counts)
    while held < max(1, wanted) and first - 1 > used[0]:
        first -= 1
        held += counts[first]
    return first, 0


def _masked(batch: Batch, first: int, position: int, held: bool) -> Batch:
    """The batch with only the tokens before a position of a sequence, or with only the ``held`` ones, unmasked."""
    numbers = torch.tensor(list(batch.sequences))[:, None]
    places = torch.arange(batch.mask.shape[1])
    after = (numbers > first) | ((numbers == first) & (places >= position))
    mask = batch.mask & (after if held else ~after)
    return dataclasses.replace(batch, mask=mask, num_tokens=int(mask.sum()))
