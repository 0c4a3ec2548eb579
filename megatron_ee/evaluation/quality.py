"""Quality per exit on validation windows: the loop that feeds ``model.metrics``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_ee import platform
from megatron_ee.data.loader import ValidationWindows
from megatron_ee.evaluation.final_exit import FinalExit
from megatron_ee.model.metrics import Quality, QualityAccumulator
from megatron_ee.model.stage import Stage
from megatron_ee.progress import track
from megatron_ee.tuning.step import to_device


def measure(
    stage: Stage,
    windows: ValidationWindows,
    thresholds: Sequence[float],
    *,
    final: FinalExit | None = None,
    batch_size: int = 1,
    chunk_tokens: int = 512,
) -> Quality:
    """Quality of the stage's exits.

    Args:
        stage: holds every exit; and the final exit too, where ``final`` is not given.
        windows: what to score; each data-parallel rank takes its share.
        thresholds: confidences of the sweep.
        final: the final exit's outcome, computed before.
        batch_size: windows at a time.
        chunk_tokens: tokens whose logits exist at one time.

    Raises:
        DataError: not one token counts.
    """
    groups = stage.setup.groups
    specs = [exit_.spec for exit_ in stage.exits]
    sums = QualityAccumulator(
        [spec.layer for spec in specs],
        stage.setup.architecture.num_layers,
        thresholds,
        body_layers=[int(spec.body == "layer") for spec in specs],
    )
    rank, size = groups.data.rank(), groups.data.size()
    done = 0
    with track(len(range(rank, len(windows), size)), "sequences", "validating", enabled=groups.is_main) as bar:
        for batch in windows.batches(batch_size, rank, size):
            labels, mask = to_device(batch)
            positions = stage.backbone.positions(0, batch.tokens.shape[1])
            with torch.no_grad():
                h = stage.backbone.embed(batch.tokens.to(labels.device))
            h, taps = stage.run_layers(h, positions, to_end=final is None)
            exits = [
                exit_.statistics(taps[exit_.spec.layer], positions, labels, chunk_tokens=chunk_tokens)
                for exit_ in stage.exits
            ]
            count = len(batch.tokens)
            last = (
                stage.final_statistics(h, labels, chunk_tokens=chunk_tokens)
                if final is None
                else final.take(done, count)
            )
            sums.update(exits, last, labels, mask > 0)
            done += count
            bar.advance(count)
    if size > 1:
        total = sums.sums.to(platform.device())
        dist.all_reduce(total, group=groups.data)
        sums.sums.copy_(total)
    return sums.result()
