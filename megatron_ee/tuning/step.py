"""One tuning step (arXiv 2402.00518, section 3.3).

Per microbatch the frozen layers run without gradient and keep only the taps (``tuning.schedule``); then each exit
computes its own loss and gradients, a chunk of tokens at a time if its body allows this. So only one exit's graph of
one chunk is alive at a time, and no gradient reaches the backbone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.schema import LossConfig
from megatron_ee.data.loader import Batch
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.registry import trains
from megatron_ee.exits.stage import Stage
from megatron_ee.model.distillation import Distillation, Teacher, teacher_top_k
from megatron_ee.parallel.groups import Groups
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.tuning.schedule import Microbatch, Pipeline


@dataclass(frozen=True)
class ExitResult:
    """One exit in one step.

    Attributes:
        layer: the layer it reads.
        loss: mean cross-entropy over the unmasked tokens of the global batch, in nats, without weights.
        weight: the loss weight in effect.
        grad_norm: norm of its gradients before clipping.
    """

    layer: int
    loss: float
    weight: float
    grad_norm: float


@dataclass(frozen=True)
class StepResult:
    """What one step reports, equal on every rank.

    Attributes:
        tokens: unmasked labels of the global batch.
        lr: learning rate used.
        grad_norm: over all exits of all stages, before clipping.
        exits: the trained exits of all stages, by layer.
        skipped: why nothing was updated: the exits and sequences whose loss or gradient is not finite. Empty after an
            update.
    """

    tokens: int
    lr: float
    grad_norm: float
    exits: tuple[ExitResult, ...]
    skipped: str = ""


def tuning_step(
    pipeline: Pipeline, optimizer: ExitOptimizer, batches: Sequence[Batch], loss: LossConfig, ramp: float
) -> StepResult:
    """Train the exits of all stages on one global batch.

    Args:
        pipeline: this rank's stage and its links to the others.
        optimizer: of the exits on this stage.
        batches: this data-parallel rank's microbatches.
        loss: settings of the loss.
        ramp: factor of all loss weights at this step, see ``weight_ramp``.
    """
    stage = pipeline.stage
    tokens = _global_tokens(batches, optimizer.groups.data)
    weights = {spec.layer: spec.weight * ramp for spec in pipeline.specs if trains(spec)}
    sums = {layer: torch.zeros((), dtype=torch.float64, device=platform.device()) for layer in weights}
    trained = [exit_ for exit_ in stage.exits if exit_.trains]
    chunk = min(loss.chunk_tokens, stage.setup.tiles.logit_tokens)
    at_a_time = max(chunk, stage.setup.tiles.graph_tokens)

    def train_exits(micro: Microbatch, teacher: Teacher | None) -> None:
        for exit_ in trained:
            layer, wrapper = exit_.spec.layer, optimizer.wrappers[exit_]
            if layer not in micro.taps:
                continue
            optimizer.begin(exit_)
            pieces, last_one = _pieces(exit_, micro, at_a_time), micro.number == len(batches) - 1
            for number, (tap, labels, mask, part) in enumerate(pieces, start=1):
                last = last_one and number == len(pieces)
                # The last backward starts the gradient reduction over data-parallel ranks.
                with contextlib.nullcontext() if last else wrapper.no_sync():
                    exit_loss, stats = wrapper(
                        tap,
                        micro.positions,
                        labels,
                        mask * (weights[layer] / tokens),
                        dynamic=loss.dynamic_token_weights,
                        chunk_tokens=chunk,
                        distillation=_distillation(loss, teacher, part),
                    )
                    exit_loss.backward()
                total = torch.dot(stats.loss, mask)
                sums[layer] += total
                parts.append((layer, micro.batch.sequences, total))
            if last_one:
                optimizer.finish(exit_)

    def teach(micro: Microbatch, h: Tensor) -> Teacher:
        head, tensor, given = stage.backbone.head, stage.setup.groups.tensor, loss.distillation
        assert head is not None, "the last stage holds the final exit"
        z = stage.final_features(h).flatten(0, 1)
        return teacher_top_k(z, head, tensor, given.top_k, given.temperature, chunk_tokens=chunk)

    parts: list[tuple[int, range, Tensor]] = []
    optimizer.zero_gradients()
    taught = loss.distillation.kl > 0
    pipeline.run(batches, train_exits, teach if taught else None, taught=taught)
    optimizer.reduce_gradients()

    losses, norms = _over_all_ranks(sums, {exit_.spec.layer: optimizer.squared_norm(exit_) for exit_ in trained}, stage)
    exits = tuple(ExitResult(n, losses[n] / tokens, weights[n], math.sqrt(norms[n])) for n in sorted(weights))
    lr, grad_norm, skipped = optimizer.learning_rate, math.sqrt(sum(norms.values())), ""
    if math.isfinite(grad_norm) and all(math.isfinite(value) for value in losses.values()):
        optimizer.step(grad_norm)
    else:
        optimizer.skip()
        skipped = _not_finite(exits, optimizer.groups.gather(_bad_parts(parts)), _sequences(batches, optimizer.groups))
    return StepResult(tokens, lr, grad_norm, exits, skipped)


def weight_ramp(loss: LossConfig, step: int, steps: int) -> float:
    """Factor of the exits' loss weights at ``step`` (from 0) of ``steps``: rises to 1, linearly or as half a cosine."""
    warmup = round(loss.weight_warmup_fraction * steps) if loss.weight_warmup != "none" else 0
    if step + 1 >= warmup:
        return 1.0
    done = (step + 1) / warmup
    return done if loss.weight_warmup == "linear" else 0.5 * (1 - math.cos(math.pi * done))


def _pieces(exit_: Exit, micro: Microbatch, at_a_time: int) -> list[tuple[Tensor, Tensor, Tensor, slice]]:
    """The chunks that an exit computes in turn: tap, labels and mask of some tokens, and their range."""
    taps = exit_.pieces(micro.taps.pop(exit_.spec.layer), at_a_time)
    size = at_a_time if len(taps) > 1 else len(micro.labels)
    parts = [slice(start, start + size) for start in range(0, len(micro.labels), size)]
    return [(tap, micro.labels[part], micro.mask[part], part) for tap, part in zip(taps, parts, strict=True)]


def _distillation(loss: LossConfig, teacher: Teacher | None, part: slice) -> Distillation | None:
    if teacher is None:
        return None
    settings, of_part = loss.distillation, Teacher(teacher.ids[part], teacher.log_probabilities[part])
    return Distillation(of_part, settings.kl, settings.cross_entropy, settings.temperature)


def _global_tokens(batches: Sequence[Batch], data: dist.ProcessGroup) -> int:
    """Number of unmasked tokens of the global batch, reduced before the first backward."""
    own = sum(batch.num_tokens for batch in batches)
    count = torch.full((), own, dtype=torch.int64, device=platform.device())
    dist.all_reduce(count, group=data)
    # A batch without unmasked tokens has zero loss; 1 avoids 0 / 0.
    return max(1, int(count))


def _over_all_ranks(
    losses: dict[int, Tensor], norms: dict[int, Tensor], stage: Stage
) -> tuple[dict[int, float], dict[int, float]]:
    """Summed losses and squared gradient norms of every trained exit of every stage, by layer, in one reduction."""
    both = torch.zeros(2, len(losses), dtype=torch.float64, device=platform.device())
    for place, (layer, loss) in enumerate(losses.items()):
        if stage.setup.groups.tensor.rank() == 0:  # all tensor-parallel ranks have the same loss
            both[0, place] = loss
        if layer in norms:
            both[1, place] = norms[layer]
    dist.all_reduce(both, group=stage.setup.groups.world)
    sums, squares = both.tolist()
    return dict(zip(losses, sums, strict=True)), dict(zip(losses, squares, strict=True))


def _bad_parts(parts: Sequence[tuple[int, range, Tensor]]) -> list[tuple[int, list[int]]]:
    """Exit and sequences of each microbatch whose loss is not finite."""
    finite = torch.stack([total for _, _, total in parts]).isfinite().tolist() if parts else []
    pairs = zip(parts, finite, strict=True)
    return [(layer, list(sequences)) for (layer, sequences, _), fine in pairs if not fine]


def _sequences(batches: Sequence[Batch], groups: Groups) -> range:
    """Range of the global batch's sequences."""
    ranges = groups.gather([batch.sequences for batch in batches])
    together = [each for own in ranges for each in own]
    return range(min(each.start for each in together), max(each.stop for each in together))


def _not_finite(exits: Sequence[ExitResult], gathered: Sequence[list[tuple[int, list[int]]]], of_step: range) -> str:
    """Message that names exits and sequences. If only the gradient is not finite, it names all sequences of the
    step."""
    where: dict[int, set[int]] = {}
    for layer, sequences in (pair for pairs in gathered for pair in pairs):
        where.setdefault(layer, set()).update(sequences)
    lines = []
    for exit_ in exits:
        if not math.isfinite(exit_.loss):
            lines.append(f"exit {exit_.layer}: loss {exit_.loss} in sequences {sorted(where.get(exit_.layer, ()))}")
        elif not math.isfinite(exit_.grad_norm):
            among = f"sequences {of_step.start} to {of_step.stop - 1}"
            lines.append(f"exit {exit_.layer}: gradient norm {exit_.grad_norm}, loss finite, in {among}")
    return "; ".join(lines)
