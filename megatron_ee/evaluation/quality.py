"""Measures quality per exit on validation windows, over all stages. ``model.metrics`` accumulates it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee import platform
from megatron_ee.data.loader import Batch, ValidationWindows, Windows
from megatron_ee.evaluation.final_exit import FinalExit
from megatron_ee.exits.registry import body_of
from megatron_ee.model.metrics import QualityAccumulator, TokenStats
from megatron_ee.model.quality import Quality
from megatron_ee.parallel.groups import Groups
from megatron_ee.progress import track
from megatron_ee.tuning.schedule import Microbatch, Pipeline

FINAL = 0
"""The final exit's key in dictionaries of exits by layer."""


def measure(
    pipeline: Pipeline,
    windows: ValidationWindows,
    thresholds: Sequence[float],
    *,
    final: FinalExit | None = None,
    batch_size: int = 1,
    chunk_tokens: int = 512,
    check: Callable[[], None] = lambda: None,
) -> Quality:
    """Measure the quality of the exits of all stages. The result is equal on every rank.

    Each stage sends three numbers per token and exit to the first stage, which accumulates them.

    Args:
        pipeline: the stages. The last one holds the final exit if ``final`` is not given.
        windows: validation windows; each data-parallel rank takes its share.
        thresholds: confidences of the sweep.
        final: results of the final exit; None to compute them.
        batch_size: windows per pass.
        chunk_tokens: tokens whose logits exist at a time.
        check: called by every rank between groups of microbatches; it may raise, on all ranks.

    Raises:
        DataError: all tokens are masked.
    """
    stage, specs, groups = pipeline.stage, pipeline.specs, pipeline.stage.setup.groups
    sums = QualityAccumulator(
        [spec.layer for spec in specs],
        stage.setup.architecture.num_layers,
        thresholds,
        body_layers=[body_of(spec).extra_layers for spec in specs],
    )
    rank, size = groups.data.rank(), groups.data.size()
    done = 0
    with track(len(range(rank, len(windows), size)), "sequences", "validating", enabled=groups.is_main) as bar:
        scored = scored_batches(
            pipeline, windows, final=final is None, batch_size=batch_size, chunk_tokens=chunk_tokens, check=check
        )
        for batch, stats in scored:
            count = len(batch.tokens)
            if stats:
                labels, mask = (tensor.t().reshape(-1) for tensor in (batch.labels, batch.mask))
                exits = [stats[spec.layer] for spec in specs]
                sums.update(exits, stats[FINAL] if final is None else final.take(done, count), labels, mask)
            done += count
            bar.advance(count)
    sum_over_ranks(sums.sums, groups)
    return sums.result()


def scored_batches(
    pipeline: Pipeline,
    windows: Windows,
    *,
    final: bool = False,
    batch_size: int,
    chunk_tokens: int,
    check: Callable[[], None],
) -> Iterator[tuple[Batch, dict[int, TokenStats]]]:
    """This data-parallel rank's batches, with their statistics by layer of the exit on the first stage (else empty).

    ``final``: whether to score the final exit too, with key ``FINAL``. Other arguments as for ``measure``.
    """
    groups = pipeline.stage.setup.groups
    rank, size = groups.data.rank(), groups.data.size()
    length = pipeline.batches_per_run(batch_size, windows.sequence_length)
    for batches in windows.runs(batch_size, rank, size, length=length, check=check):
        scored = _on_first_stage(pipeline, _score(pipeline, batches, chunk_tokens, final), batches)
        for number, batch in enumerate(batches):
            yield batch, {layer: stats[number] for layer, stats in scored.items()}


def sum_over_ranks(sums: Tensor, groups: Groups) -> None:
    """Replace ``sums``, on the CPU, by the total of the first stages of all data-parallel ranks, on every rank."""
    total = sums.to(platform.device())
    dist.broadcast(total, group=groups.pipeline, group_src=0)
    dist.all_reduce(total, group=groups.data)
    sums.copy_(total)


def _score(
    pipeline: Pipeline, batches: Sequence[Batch], chunk_tokens: int, with_final: bool
) -> dict[int, list[TokenStats]]:
    """Run the exits of this stage. Returns the statistics of each microbatch, by layer of the exit."""
    stage, layers = pipeline.stage, [spec.layer for spec in pipeline.specs]
    scored: dict[int, list[TokenStats]] = {layer: [] for layer in (*layers, *([FINAL] if with_final else []))}

    def exits_work(micro: Microbatch, teacher: object) -> None:
        for exit_ in stage.exits:
            if (tap := micro.taps.get(exit_.spec.layer)) is not None:
                stats = exit_.statistics(tap, micro.positions, micro.labels, chunk_tokens=chunk_tokens)
                scored[exit_.spec.layer].append(stats)

    def at_end(micro: Microbatch, h: Tensor) -> None:
        scored[FINAL].append(stage.final_statistics(h, micro.labels, chunk_tokens=chunk_tokens))

    pipeline.run(batches, exits_work, at_end if with_final else None)
    return scored


def _on_first_stage(
    pipeline: Pipeline, scored: dict[int, list[TokenStats]], batches: Sequence[Batch]
) -> dict[int, list[TokenStats]]:
    """Send the statistics of all stages to the first stage. Returns them there; empty on other stages."""
    group, layout = pipeline.stage.setup.groups.pipeline, pipeline.layout
    tokens = [batch.tokens.numel() for batch in batches]
    for layer, stats in scored.items():
        host = layout.last_layered if layer == FINAL else layout.host(layer)
        if host == group.rank() > 0:
            dist.send(torch.cat([_packed(each) for each in stats], dim=1), group=group, group_dst=0)
        elif host > group.rank() == 0:
            message = torch.empty(3, sum(tokens), dtype=torch.int32, device=platform.device())
            dist.recv(message, group=group, group_src=host)
            scored[layer] = [_unpacked(part) for part in message.split(tokens, dim=1)]
    return scored if group.rank() == 0 else {}


def _packed(stats: TokenStats) -> Tensor:
    """Pack statistics as ``[3, tokens]`` int32, with floats as their bits."""
    return torch.stack([stats.loss.view(torch.int32), stats.confidence.view(torch.int32), stats.top1.int()])


def _unpacked(packed: Tensor) -> TokenStats:
    loss, confidence, top1 = packed.contiguous().unbind()
    return TokenStats(loss.view(torch.float32), confidence.view(torch.float32), top1.long())
