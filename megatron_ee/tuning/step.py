"""One tuning step (design: the tuning step; arXiv 2402.00518, section 3.3).

Per microbatch the frozen layers run without gradient and keep only the taps; then each exit computes its loss and its
gradients by itself, so one exit's graph is alive at a time and nothing flows back into the backbone.
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
from megatron_ee.model.exits import Exit
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.optimizer import ExitOptimizer


@dataclass(frozen=True)
class ExitResult:
    """One exit in one step.

    Attributes:
        layer: where it stands.
        loss: mean cross-entropy over the unmasked tokens of the global batch, nats; without any weight.
        weight: the loss weight in effect.
        grad_norm: norm of its gradients before clipping.
    """

    layer: int
    loss: float
    weight: float
    grad_norm: float


@dataclass(frozen=True)
class StepResult:
    """What one step reports: ``tokens`` that counted, ``grad_norm`` over all exits before clipping, ``lr`` used."""

    tokens: int
    lr: float
    grad_norm: float
    exits: tuple[ExitResult, ...]


def tuning_step(
    stage: Stage, optimizer: ExitOptimizer, batches: Sequence[Batch], loss: LossConfig, ramp: float
) -> StepResult:
    """Train the exits of ``stage`` on this rank's microbatches of one global batch.

    Args:
        stage: layers and exits of this process.
        optimizer: of the exits.
        batches: this data-parallel rank's microbatches.
        loss: settings of the loss.
        ramp: factor of all loss weights at this step, see ``weight_ramp``.
    """
    tokens = _global_tokens(batches, optimizer)
    trained = [exit_ for exit_ in stage.exits if exit_ in optimizer.wrappers]
    weights = {exit_: exit_.spec.weight * ramp for exit_ in trained}
    losses = {exit_: torch.zeros((), device=platform.device()) for exit_ in trained}

    optimizer.zero_gradients()
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        labels, mask = to_device(batch)
        positions = stage.backbone.positions(0, batch.tokens.shape[1])
        with torch.no_grad():
            h = stage.backbone.embed(batch.tokens.to(labels.device))
        _, taps = stage.run_layers(h, positions)
        for exit_ in trained:
            wrapper = optimizer.wrappers[exit_]
            # The last microbatch's backward starts the reduction over data-parallel ranks.
            with contextlib.nullcontext() if last else wrapper.no_sync():
                exit_loss, stats = wrapper(
                    taps.pop(exit_.spec.layer),
                    positions,
                    labels,
                    mask * (weights[exit_] / tokens),
                    dynamic=loss.dynamic_token_weights,
                    chunk_tokens=loss.chunk_tokens,
                )
                exit_loss.backward()
            losses[exit_] += torch.dot(stats.loss, mask)
    optimizer.reduce_gradients()
    norms = {exit_: optimizer.gradient_norm(exit_) for exit_ in trained}
    lr, grad_norm = optimizer.learning_rate, optimizer.step()
    means = _mean_losses(losses, tokens, optimizer)
    exits = (ExitResult(exit_.spec.layer, means[exit_], weights[exit_], norms[exit_]) for exit_ in trained)
    return StepResult(tokens, lr, grad_norm, tuple(exits))


def weight_ramp(loss: LossConfig, step: int, steps: int) -> float:
    """Factor of the exits' loss weights at ``step`` (from 0) of ``steps``: rises to 1, linearly or as half a cosine."""
    warmup = round(loss.weight_warmup_fraction * steps) if loss.weight_warmup != "none" else 0
    if step + 1 >= warmup:
        return 1.0
    done = (step + 1) / warmup
    return done if loss.weight_warmup == "linear" else 0.5 * (1 - math.cos(math.pi * done))


def to_device(batch: Batch) -> tuple[Tensor, Tensor]:
    """Labels int64 and mask float32 of a microbatch, ``[seq * batch]``, sequence-major as hidden states are."""
    labels, mask = (tensor.t().reshape(-1).to(platform.device()) for tensor in (batch.labels, batch.mask))
    return labels, mask.float()


def _global_tokens(batches: Sequence[Batch], optimizer: ExitOptimizer) -> int:
    """Unmasked tokens of the global batch, known before the first backward."""
    count = torch.tensor(sum(batch.num_tokens for batch in batches), device=platform.device())
    dist.all_reduce(count, group=optimizer.groups.data)
    # A batch without a single one has no loss: 1 keeps its zeros from becoming 0 / 0.
    return max(1, int(count))


def _mean_losses(losses: dict[Exit, Tensor], tokens: int, optimizer: ExitOptimizer) -> dict[Exit, float]:
    if not losses:
        return {}
    sums = torch.stack(list(losses.values()))
    dist.all_reduce(sums, group=optimizer.groups.data)
    return dict(zip(losses, (sums / tokens).tolist(), strict=True))
