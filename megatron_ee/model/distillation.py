"""Distillation from the final exit, in addition to the labels (soft targets, arXiv 1503.02531).

Only the most probable tokens of the final exit's distribution are kept, so that it is small enough to send to the
stages that host exits. ``exit_loss`` uses it through ``SoftTargets``, in chunks of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee.model.backbone import VocabHead
from megatron_ee.parallel.tiles import TOP_RUN

LEAST_REST = 1e-6
"""Lower bound of an exit's total probability of the tokens that the teacher does not keep; smaller values are rounding
errors."""


@dataclass(frozen=True)
class Teacher:
    """The final exit's most probable tokens, in descending order.

    Attributes:
        ids: ``[tokens, k]`` int64, token ids of the whole vocabulary.
        log_probabilities: ``[tokens, k]`` float32, of the softmax over the whole vocabulary at the temperature.
    """

    ids: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True)
class Distillation:
    """The teacher and the loss weights of distillation.

    The loss of a token is ``cross_entropy * CE + kl * temperature^2 * KL(p || q)``. p is the teacher's distribution
    over the kept tokens and one class for all others, and q the exit's, both at ``temperature``. Without that class an
    exit would learn that the other tokens never occur, which harms cross-entropy and calibration.

    Attributes:
        teacher: computed at ``temperature``.
        kl: weight of the divergence.
        cross_entropy: weight of the cross-entropy with the label.
        temperature: divides the logits of both.
    """

    teacher: Teacher
    kl: float
    cross_entropy: float
    temperature: float


class SoftTargets:
    """The teacher's distributions for one chunk of tokens, and the loss against them.

    Call ``read`` before the chunk's logits are exponentiated, then ``compare`` with the sums over tensor-parallel
    ranks, then the other methods.
    """

    def __init__(
        self, distillation: Distillation, part: slice, columns: Tensor, here: Tensor, tempered: Tensor | None
    ) -> None:
        """Create the targets of the tokens ``part``.

        Args:
            distillation: teacher of all tokens, and weights.
            part: the chunk.
            columns: ``[chunk, k]`` int64, each id's column in this rank's logits; any value if the id belongs to
                another rank.
            here: ``[chunk, k]`` bool, whether the id belongs to this rank.
            tempered: scratch ``[chunk, padded_vocab / tp]`` float32, if the temperature is not 1.
        """
        self.temperature, self.columns, self.here, self.tempered = distillation.temperature, columns, here, tempered
        self.cross_entropy, self.kl = distillation.cross_entropy, distillation.kl
        self.probabilities = distillation.teacher.log_probabilities[part].exp()
        self.rest = (1 - self.probabilities.sum(dim=1)).clamp(min=0)

    def read(self, logits: Tensor) -> list[Tensor]:
        """Compute this rank's part of the arguments of ``compare``, from the logits minus their maximum.

        Returns:
            Tensors ``[chunk]``, to be summed over tensor-parallel ranks: the teacher's mean logit and the sum of the
            exponentials, both over its kept tokens, and the sum of all exponentials at the temperature if it is not 1.
        """
        own = torch.where(self.here, logits.gather(1, self.columns) / self.temperature, 0.0)
        self.kept = torch.where(self.here, own.exp(), 0.0)
        sums = [torch.linalg.vecdot(self.probabilities, own), self.kept.sum(dim=1)]
        if self.tempered is not None:
            torch.mul(logits, 1 / self.temperature, out=self.tempered)
            sums.append(self.tempered.exp_().sum(dim=1))
        return sums

    def compare(self, total: Tensor, mean_logit: Tensor, kept: Tensor, tempered_total: Tensor | None = None) -> None:
        """Compute the divergence from sums over the whole vocabulary, ``[chunk]`` each.

        Args:
            total: sum of the exponentials at temperature 1.
            mean_logit: first result of ``read``.
            kept: second result of ``read``.
            tempered_total: third result of ``read``, if the temperature is not 1.
        """
        self.total = total if tempered_total is None else tempered_total
        rest = (1 - kept / self.total).clamp(min=LEAST_REST)
        self.ratio = self.rest / rest
        entropy = torch.special.entr(self.probabilities).sum(dim=1)
        cross = self.probabilities.sum(dim=1) * self.total.log() - mean_logit
        self.divergence = cross - entropy + torch.special.xlogy(self.rest, self.ratio)

    def loss(self, nll: Tensor) -> Tensor:
        """Loss of each token ``[chunk]``, from its cross-entropy ``[chunk]``."""
        return self.cross_entropy * nll + self.kl * self.temperature**2 * self.divergence

    def scales(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the exit's probabilities at temperature 1, and of the label, in the gradient of the logits."""
        # At temperature 1 the divergence and the cross-entropy use the same probabilities.
        own = self.cross_entropy + (self.kl * (1 - self.ratio) if self.tempered is None else 0.0)
        return scale * own, scale * self.cross_entropy

    def add_gradient_(self, gradient: Tensor, scale: Tensor) -> None:
        """Add the part of the gradient that ``scales`` does not cover.

        The whole gradient of the divergence is ``scale * kl * temperature`` times ``q - p`` for the kept tokens, and
        times ``q * (1 - ratio)`` for the others. ``ratio`` is the teacher's total probability of the others divided by
        the exit's.
        """
        pull = scale * (self.kl * self.temperature)
        if self.tempered is not None:
            gradient.addcmul_(self.tempered, (pull * (1 - self.ratio) / self.total)[:, None])
        kept = self.kept * (self.ratio / self.total)[:, None] - self.probabilities
        gradient.scatter_add_(1, self.columns, torch.where(self.here, pull[:, None] * kept, 0.0))


@torch.no_grad()
def teacher_top_k(
    z: Tensor, head: VocabHead, group: dist.ProcessGroup, k: int, temperature: float = 1.0, *, chunk_tokens: int = 512
) -> Teacher:
    """The ``k`` most probable tokens of the final exit. Among equal logits the lower token id comes first.

    Args:
        z: ``[tokens, hidden]``, after the final norm, equal on all tensor-parallel ranks.
        head: this rank's rows of the frozen LM head.
        group: tensor-parallel ranks; all get the same result.
        k: number of tokens to keep; a smaller vocabulary is kept whole.
        temperature: divides the logits.
        chunk_tokens: tokens whose logits exist at a time.
    """
    weight, tokens = head.weight, len(z)
    width = min(k, len(weight))
    values = torch.empty((tokens, width), dtype=torch.float32, device=z.device)
    ids = torch.empty(values.shape, dtype=torch.int64, device=z.device)
    log_total = torch.empty((tokens, 1), dtype=torch.float32, device=z.device)
    for start in range(0, tokens, chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits = head.capped(torch.mm(z[part], weight.t()).float()).div_(temperature)
        logits[:, head.valid :] = -torch.inf
        values[part], ids[part] = _top_columns(logits, width)
        # Finite even on a rank that has only padding.
        highest = values[part, :1].clamp(min=torch.finfo(torch.float32).min)
        log_total[part] = highest + logits.sub_(highest).exp_().sum(dim=1, keepdim=True).log()
    ids += head.start

    if group.size() > 1:
        values, ids, log_total = (_gathered(tensor, group) for tensor in (values, ids, log_total))
        # Ranks hold ascending ids, so a stable sort keeps the lower id first.
        values, order = values.sort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
    k = min(k, head.vocabulary)
    return Teacher(ids[:, :k].contiguous(), values[:, :k] - log_total.logsumexp(dim=1, keepdim=True))


def _top_columns(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest values of each row and their columns. Equal values are in order of column, unlike in ``topk``.

    The values lie in the ``k`` blocks of columns with the highest maxima, so only these blocks are sorted.
    """
    run = TOP_RUN if logits.shape[1] % TOP_RUN == 0 else 1
    runs = logits.unflatten(1, (-1, run))
    kept = runs.amax(dim=2).sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    candidates = runs.gather(1, kept[:, :, None].expand(-1, -1, run)).flatten(1)
    values, order = candidates.sort(dim=1, descending=True, stable=True)
    values, order = values[:, :k], order[:, :k]
    return values, kept.gather(1, order // run) * run + order % run


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather ``[tokens, n]`` from all tensor-parallel ranks: ``[tokens, n * tp]``, in rank order."""
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=1)
