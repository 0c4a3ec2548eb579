"""Loss of one exit, in chunks of tokens over a vocabulary-parallel head.

The logits of a whole microbatch never exist at once. Each chunk's logits are turned into loss, statistics and gradient,
and their memory is reused. Gradients are computed in the forward pass, so logits are not computed twice. So the factor
of the loss (exit weight / tokens of the global batch) must be known in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee.model.backbone import VocabHead
from megatron_ee.model.distillation import Distillation, SoftTargets
from megatron_ee.model.metrics import TokenStats
from megatron_ee.parallel.tiles import ROW_RUN, VOCAB_RUN, Tiles

CPU = Tiles()


@dataclass(frozen=True)
class LowRank:
    """The trained part of a ``low_rank`` head: its logits are ``weight z + up (down z)``.

    Attributes:
        hidden: ``down z``, ``[tokens, rank]``.
        up: ``[padded_vocab / tp, rank]``.
    """

    hidden: Tensor
    up: Tensor


def exit_loss(
    z: Tensor,
    head: VocabHead,
    labels: Tensor,
    coefficient: Tensor,
    group: dist.ProcessGroup,
    *,
    low_rank: LowRank | None = None,
    dynamic: bool = False,
    distillation: Distillation | None = None,
    chunk_tokens: int = 512,
    tiles: Tiles = CPU,
) -> tuple[Tensor, TokenStats]:
    """Weighted sum of the tokens' losses, differentiable once with respect to ``z``, the head and ``low_rank``.

    Args:
        z: ``[tokens, hidden]``, after the exit's norm, equal on all tensor-parallel ranks.
        head: this rank's rows of the head.
        labels: ``[tokens]`` int64, global token ids.
        coefficient: ``[tokens]`` float32, factor of each token's loss: exit weight / tokens of the global batch, 0
            where the token is masked. Gradients include it, so the result must be backpropagated with gradient 1.
        group: tensor-parallel ranks.
        low_rank: the trained correction of a ``low_rank`` head.
        dynamic: also weight each token by the exit's detached maximum probability (EE-LLM, arXiv 2312.04916).
        distillation: the teacher and its weights, if the loss is not only the cross-entropy.
        chunk_tokens: maximum number of tokens whose logits exist at a time; ``tiles.logit_tokens`` also limits it.
        tiles: sizes for the device of ``z``.

    Returns:
        The loss, a float32 scalar equal on all tensor-parallel ranks, and the detached statistics of each token. Their
        loss is the cross-entropy, even with distillation.
    """
    hidden, up = (None, None) if low_rank is None else (low_rank.hidden, low_rank.up)
    inputs: tuple[Tensor | None, ...] = (z, head.weight, hidden, up)
    if not torch.is_grad_enabled():  # a Function's needs_input_grad does not know that
        inputs = tuple(None if each is None else each.detach() for each in inputs)
    loss, nll, confidence, top1 = _ExitLoss.apply(
        *inputs, head, labels, coefficient, group, dynamic, distillation, chunk_tokens, tiles
    )
    return loss, TokenStats(nll, confidence, top1)


def exit_statistics(
    z: Tensor,
    head: VocabHead,
    labels: Tensor,
    group: dist.ProcessGroup,
    *,
    low_rank: LowRank | None = None,
    chunk_tokens: int = 512,
    tiles: Tiles = CPU,
) -> TokenStats:
    """Loss, confidence and top-1 token of each token, without gradients; arguments as in ``exit_loss``."""
    with torch.no_grad():
        coefficient = torch.ones(len(labels), device=z.device)
        _, stats = exit_loss(
            z, head, labels, coefficient, group, low_rank=low_rank, chunk_tokens=chunk_tokens, tiles=tiles
        )
    return stats


class _ExitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        hidden: Tensor | None,
        up: Tensor | None,
        head: VocabHead,
        labels: Tensor,
        coefficient: Tensor,
        group: dist.ProcessGroup,
        dynamic: bool,
        distillation: Distillation | None,
        chunk_tokens: int,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs_z, needs_weight, needs_hidden, needs_up = ctx.needs_input_grad[:4]
        grad_z = torch.empty_like(z) if needs_z else None
        grad_hidden = torch.empty_like(hidden) if needs_hidden and hidden is not None else None
        grad_weight = _gradient_sum(weight) if needs_weight else None
        grad_up = _gradient_sum(up) if needs_up and up is not None else None
        nll = torch.empty(len(labels), dtype=torch.float32, device=z.device)
        confidence, top1 = torch.empty_like(nll), torch.empty_like(labels)
        loss = torch.zeros((), dtype=torch.float32, device=z.device)
        two_temperatures = distillation is not None and distillation.temperature != 1
        at_most = min(chunk_tokens, tiles.logit_tokens)
        capped = head.soft_cap is not None
        scratch = _Scratch.allocate(z, weight, min(at_most, len(z)), needs_weight, two_temperatures, capped, tiles)

        for start in range(0, len(z), at_most):
            chunk = slice(start, start + at_most)
            logits = scratch.logits[: len(z[chunk])]
            for rows, columns in zip(weight.split(tiles.head_rows), logits.split(tiles.head_rows, dim=1), strict=True):
                torch.mm(z[chunk], rows.t(), out=columns)
            for first in range(0, len(logits), scratch.rows):
                run = logits[first : first + scratch.rows]
                part = slice(start + first, start + first + len(run))
                exact = scratch.widened(run)
                if hidden is not None and up is not None:
                    exact += torch.mm(hidden[part], up.t())
                slope = None if head.soft_cap is None else scratch.cap_(exact, head.soft_cap)
                exact[:, head.valid :] = -torch.inf
                scale = coefficient[part]
                soft = None if distillation is None else _soft_targets(distillation, part, head, scratch)
                label = _local_columns(labels[part], head)
                nll[part], confidence[part], top1[part] = _exponentiate_(exact, label, head, group, soft)
                if dynamic:
                    scale = scale * confidence[part]
                loss += torch.dot(nll[part] if soft is None else soft.loss(nll[part]), scale)
                if any(ctx.needs_input_grad[:4]):
                    _logit_gradient_(exact, confidence[part], label, scale, soft)
                    if slope is not None:
                        exact *= slope
                    scratch.narrow_(run, exact)
            if grad_z is not None:
                torch.mm(logits, weight, out=grad_z[chunk])
            if grad_hidden is not None and up is not None:
                torch.mm(logits, up, out=grad_hidden[chunk])
            if grad_weight is not None:
                _accumulate_(grad_weight, logits, z[chunk], tiles, scratch)
            if grad_up is not None and hidden is not None:
                _accumulate_(grad_up, logits, hidden[chunk], tiles, None)

        for partial in (grad_z, grad_hidden):
            if partial is not None and group.size() > 1:
                dist.all_reduce(partial, group=group)
        ctx.gradients = (
            grad_z,
            _as_gradient(grad_weight, weight),
            grad_hidden,
            None if up is None else _as_gradient(grad_up, up),
        )
        ctx.mark_non_differentiable(nll, confidence, top1)
        return loss, nll, confidence, top1

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Checked on the device: a check on the host would wait for every exit.
        torch._assert_async(grad_loss == 1, "an exit's loss must be backpropagated with gradient 1")
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients, *[None] * 8)


@dataclass(frozen=True)
class _Scratch:
    """Memory that the chunks of one call reuse. Allocating it for each chunk would take 10% of the time.

    Attributes:
        logits: ``[chunk, padded_vocab / tp]`` in the model's dtype, later their gradient.
        rows: tokens that are processed at a time between the matrix products, so that they stay in the CPU's caches.
        exact: ``[rows, padded_vocab / tp]`` float32, if the model's dtype is not float32.
        tempered: as ``exact``, if distillation has another temperature than 1.
        slope: as ``exact``, if logits are capped.
        product: a chunk's gradient for ``ROW_RUN`` rows of the head in the model's dtype, if this is not float32 and
            the device cannot add products in float32; ``exact_product`` the same in float32.
    """

    logits: Tensor
    rows: int
    exact: Tensor | None
    tempered: Tensor | None
    slope: Tensor | None
    product: Tensor | None
    exact_product: Tensor | None

    @classmethod
    def allocate(
        cls,
        z: Tensor,
        weight: Tensor,
        chunk: int,
        needs_weight: bool,
        two_temperatures: bool,
        capped: bool,
        tiles: Tiles,
    ) -> _Scratch:
        logits = z.new_empty((chunk, len(weight)))
        rows = max(1, min(chunk, tiles.cached_bytes // (4 * len(weight))))
        narrow = z.dtype != torch.float32
        exact = logits.new_empty((rows, len(weight)), dtype=torch.float32) if narrow else None
        tempered = logits.new_empty((rows, len(weight)), dtype=torch.float32) if two_temperatures else None
        slope = logits.new_empty((rows, len(weight)), dtype=torch.float32) if capped else None
        rounded = narrow and needs_weight and not tiles.sums_products
        product = torch.empty_like(weight[:ROW_RUN]) if rounded else None
        exact_product = None if product is None else torch.empty_like(product, dtype=torch.float32)
        return cls(logits, rows, exact, tempered, slope, product, exact_product)

    def widened(self, run: Tensor) -> Tensor:
        """Convert ``run``, some rows of ``logits``, to float32: ``run`` itself, or a copy."""
        return run if self.exact is None else self.exact[: len(run)].copy_(run)

    def cap_(self, exact: Tensor, soft_cap: float) -> Tensor:
        """Cap logits in place. Returns the derivative with respect to the uncapped logits."""
        assert self.slope is not None, "no room for the derivative"
        slope = self.slope[: len(exact)]
        exact.div_(soft_cap).tanh_()
        torch.mul(exact, exact, out=slope).neg_().add_(1)
        exact.mul_(soft_cap)
        return slope

    def narrow_(self, run: Tensor, exact: Tensor) -> None:
        """Write the changed ``widened(run)`` back into ``run``."""
        if self.exact is not None:
            run.copy_(exact)


def _soft_targets(distillation: Distillation, part: slice, head: VocabHead, scratch: _Scratch) -> SoftTargets:
    """The final exit's soft targets for some tokens."""
    ids = distillation.teacher.ids[part]
    tempered = None if scratch.tempered is None else scratch.tempered[: len(ids)]
    return SoftTargets(distillation, part, *_local_columns(ids, head), tempered)


def _exponentiate_(
    logits: Tensor,
    label: tuple[Tensor, Tensor],
    head: VocabHead,
    group: dist.ProcessGroup,
    soft: SoftTargets | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, confidence and top-1 of each token over the whole vocabulary; also calls ``soft.compare``.

    ``logits`` then holds exp(logit - highest). The probabilities are these values times the confidence (the inverse of
    their sum). The caller multiplies if it needs them, since this pass costs as much as the sum.

    Args:
        logits: ``[tokens, padded_vocab / tp]`` float32.
        label: see ``_local_columns``.
        head: this rank's rows of the head.
        group: tensor-parallel ranks.
        soft: soft targets; None without distillation.
    """
    highest, top1 = _highest(logits)
    top1 += head.start
    if group.size() > 1:
        own = highest.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        # If two ranks have equal maxima, take the lower token id, as one process does.
        top1.masked_fill_(own < highest, torch.iinfo(top1.dtype).max)
        dist.all_reduce(top1, dist.ReduceOp.MIN, group=group)
    logits -= highest[:, None]
    local, here = label
    target = torch.where(here, logits.gather(1, local[:, None])[:, 0], 0.0)
    soft_sums = [] if soft is None else soft.read(logits)
    sums = (target, logits.exp_().sum(dim=1), *soft_sums)
    if group.size() > 1:
        stacked = torch.stack(sums)
        dist.all_reduce(stacked, group=group)
        sums = stacked.unbind()
    target, total, *soft_sums = sums
    if soft is not None:
        soft.compare(total, *soft_sums)
    return total.log() - target, 1 / total, top1


def _highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row, and its first column.

    It has two steps, over blocks of columns: on the CPU a maximum is vectorised, but a maximum with its index is not.
    """
    if logits.shape[1] % VOCAB_RUN:
        return logits.max(dim=1)
    runs = logits.unflatten(1, (-1, VOCAB_RUN))
    highest, run = runs.amax(dim=2).max(dim=1)
    inside = runs[torch.arange(len(runs), device=run.device), run].argmax(dim=1)
    return highest, run * VOCAB_RUN + inside


def _logit_gradient_(
    exponentials: Tensor,
    confidence: Tensor,
    label: tuple[Tensor, Tensor],
    scale: Tensor,
    soft: SoftTargets | None,
) -> None:
    """Turn the exponentials into the gradient of the weighted loss with respect to the logits.

    Without ``soft`` this is ``scale * (probability - label)``.
    """
    local, here = label
    own_scale, label_scale = (scale, scale) if soft is None else soft.scales(scale)
    exponentials *= (confidence * own_scale)[:, None]
    exponentials.scatter_add_(1, local[:, None], torch.where(here, -label_scale, 0.0)[:, None])
    if soft is not None:
        soft.add_gradient_(exponentials, scale)


def _local_columns(ids: Tensor, head: VocabHead) -> tuple[Tensor, Tensor]:
    """Column of each id in this rank's logits (0 for other ranks' ids), and whether the id is on this rank (bool)."""
    here = (ids >= head.start) & (ids < head.start + head.valid)
    return torch.where(here, ids - head.start, 0), here


def _gradient_sum(parameter: Tensor) -> Tensor:
    """The tensor that accumulates a head's gradient: the data-parallel wrapper's buffer if there is one."""
    buffer = getattr(parameter, "main_grad", None)
    if buffer is not None:
        return buffer
    return torch.zeros_like(parameter, dtype=torch.float32)


def _accumulate_(total: Tensor, grad_logits: Tensor, inputs: Tensor, tiles: Tiles, scratch: _Scratch | None) -> None:
    """``total += grad_logits^T inputs``, summed in the dtype of ``total``. ``scratch`` holds ``ROW_RUN`` rows."""
    if total.dtype == inputs.dtype:
        total.addmm_(grad_logits.t(), inputs)
        return
    if tiles.sums_products:
        torch.addmm(total, grad_logits.t(), inputs, out_dtype=total.dtype, out=total)
        return
    product, exact_product = (None, None) if scratch is None else (scratch.product, scratch.exact_product)
    # In blocks of rows, so that the whole product is never stored and each block is converted in the CPU's cache.
    for rows, columns in zip(total.split(ROW_RUN), grad_logits.split(ROW_RUN, dim=1), strict=True):
        part = torch.mm(columns.t(), inputs, out=None if product is None else product[: len(rows)])
        rows += part if exact_product is None else exact_product[: len(rows)].copy_(part)


def _as_gradient(total: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient to return to autograd: empty if the sum was added directly to the wrapper's buffer.

    The wrapper's hook must then still run, but must not add anything. It skips parameters that are marked as below, as
    for megatron-core's fused weight gradients. A gradient passed through autograd would be a copy.
    """
    if total is None:
        return None
    if total is getattr(parameter, "main_grad", None):
        parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        parameter.grad = parameter.new_zeros(1).expand_as(parameter)  # one element
        return None
    return total.to(parameter.dtype)
