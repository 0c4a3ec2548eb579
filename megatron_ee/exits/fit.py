"""Closed-form fits of an exit's body to the final exit's features, from sums over tokens.

The norm before the head is scale-free, so an exit's features need only point where the final exit's do. Let
u = h_L / rms(h_L) be the last hidden state, r the residual that an MLP is added to, and a the input of its down
projection. The projection is fitted by ridge regression over tokens, the masked ones left out:

    D = argmin sum |c r / rms(r) + (a / rms(r)) D - u|^2 + lambda |D|^2,    down projection = D^T / (c m)

with the residual multiplier m. A bias of the projection is one more column, 1 / rms(r). lambda is the ridge times the
mean diagonal of the Gram matrix. Regressing the last hidden state on an earlier one is known from arXiv 2303.09435.

c, the share of the residual, is chosen for each exit, as the ridge is: no share is good for all. D is linear in the
right side u - c r / rms(r), so shares have the same sums and factor, and D / c is linear in 1 / c: two shares give all.

Sums are of float32 products, in float64. Tensor-parallel ranks have rows of them, each of its own features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ee.errors import UserError
from megatron_ee.model.layer import MLP

if TYPE_CHECKING:
    from megatron_ee.model.linear import RMSNorm
    from megatron_ee.model.setup import ModelSetup

RIDGES = (1.0, 10.0, 100.0)
"""Factors of ``fit.ridge`` that are tried, with the first of ``SHARES``."""
SHARES = (0.25, 0.1, 0.5, 1.0)
"""c: the residual's part of the features, relative to a last hidden state of the same size. All are tried, the others
with the best ridge."""
CANDIDATES = len(RIDGES) + len(SHARES)
"""Times that a fitted exit is measured on held-out tokens: copied, with each ridge, and with each other share."""
TRIALS = 2
"""Passes over the held-out tokens: for the ridge, then for the share."""
LEAST_PIVOT = 1e-8
"""Smallest pivot of a Cholesky factor, relative to the mean diagonal: products in float32 have errors of this size."""
NOT_FINITE = "the residual or the last hidden state is not finite"
FLOAT64 = 8  # bytes
PER_FEATURE = 16
"""Tokens for each feature that exits and gates are fitted on by default."""
HELD_OUT_MOST = 4096
"""Tokens that are held out of a fit, at most."""
MEMORY_SHARE = 0.7
"""Share of the free memory that sums may take, so that the layers and the heads have room to run."""


@dataclass(frozen=True)
class Solution:
    """Fitted values of some parameters, on this rank. A projection is interpolated between two shares.

    Attributes:
        values: by parameter, in its shape and dtype; of a projection with the largest of ``SHARES``.
        smallest: of a projection, with the smallest of ``SHARES``.
        ridge: lambda over the mean diagonal of the Gram matrix; 0 where no ridge is used.
        share: c, the residual's part of the features; None where nothing is added to a residual.
    """

    values: dict[nn.Parameter, Tensor]
    smallest: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    ridge: float = 0.0
    share: float | None = None

    @torch.no_grad()
    def place(self) -> None:
        """Set the parameters to these values."""
        for parameter, value in self.values.items():
            if parameter in self.smallest:
                assert self.share is not None, "a projection has a share"
                low, high = 1 / max(SHARES), 1 / min(SHARES)
                value = torch.lerp(value, self.smallest[parameter], (1 / self.share - low) / (high - low))
            parameter.copy_(value)

    def with_other_shares(self) -> list[Solution]:
        """The solutions of the same ridge with the other ``SHARES``; none if there is no share."""
        others = [] if self.share is None else [share for share in SHARES if share != self.share]
        return [replace(self, values=dict(self.values), share=share) for share in others]


class Fit(ABC):
    """A fit of a body. Call order: ``add`` for every microbatch, ``reduce``, ``solve`` once, ``then``."""

    @property
    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Those that it changes, and a second fit too."""

    @abstractmethod
    def add(self, x: Tensor, last: Tensor, mask: Tensor) -> None:
        """Add the tokens of a microbatch.

        Args:
            x: result of the body's ``attention_half``, ``[seq, batch, hidden]`` (a share of seq with sequence
                parallelism).
            last: the last hidden state, before the final norm, of the same shape.
            mask: ``[seq * batch]`` float32, 1 for the tokens that count, else 0.
        """

    @abstractmethod
    def reduce(self) -> None:
        """Sum over the data-parallel ranks."""

    @abstractmethod
    def solve(self, ridges: Sequence[float]) -> list[Solution]:
        """The solutions for these ridges, or only one if the fit has no ridge; equal on all data-parallel ranks.

        Those with a share have the first of ``SHARES``. The sums are freed.

        Raises:
            UserError: a sum is not finite, or all activations are 0; the message says what of the exit is wrong.
        """

    def then(self, solution: Solution) -> Fit | None:
        """A second fit, of tokens that are added while ``solution`` is placed; None if there is none."""
        return None


class ProjectionFit(Fit):
    """Of an MLP's down projection.

    Where a norm follows the projection, it decides only the direction of what is added to the residual; that norm's
    scale is fitted afterwards.
    """

    def __init__(
        self, setup: ModelSetup, mlp: MLP, before: nn.Module | None, after: RMSNorm | None, multiplier: float
    ) -> None:
        """``before`` and ``after``: the norms around the MLP; ``multiplier``: of what is added to the residual."""
        self._setup, self._mlp, self._before, self._after = setup, mlp, before, after
        self._multiplier = multiplier
        hidden, self._features = mlp.down.weight.shape
        self._biased = mlp.down.bias is not None
        rows, device = self._features + self._biased, mlp.down.weight.device
        ranks = setup.groups.tensor.size()
        self._gram = torch.zeros(rows, rows * ranks, dtype=torch.float64, device=device)
        # Right sides: of the last hidden state, and of the residual.
        self._right = torch.zeros(2, rows, hidden, dtype=torch.float64, device=device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """See ``Fit``."""
        scales = [] if self._after is None else [self._after.weight]
        return [*self._mlp.down.parameters(), *scales]

    @torch.no_grad()
    def add(self, x: Tensor, last: Tensor, mask: Tensor) -> None:
        """See ``Fit``."""
        gather, eps = self._setup.gather_sequence, self._setup.architecture.norm_eps
        activated = self._mlp.activated(x if self._before is None else self._before(x)).flatten(0, 1)
        residual = gather(x).flatten(0, 1).float()
        inverse = inverse_rms(residual, eps)
        residual = residual * inverse
        target = normalised(gather(last).flatten(0, 1), eps)
        counted = inverse * mask[:, None]
        own = activated.float() * counted
        group = self._setup.groups.tensor
        if self._biased:  # the last rank counts for all
            own = torch.cat([own, counted if group.rank() == group.size() - 1 else torch.zeros_like(counted)], dim=1)
        for sums, goal in zip(self._right, (target, residual), strict=True):
            sums += own.t() @ goal
        columns = self._gram.chunk(group.size(), dim=1)
        for part, block in zip(columns, _blocks(own, group), strict=True):
            part += own.t() @ block

    def reduce(self) -> None:
        """See ``Fit``."""
        for sums in (self._gram, self._right):
            _sum_over(sums, self._setup.groups.data)

    def solve(self, ridges: Sequence[float]) -> list[Solution]:
        """See ``Fit``. A ridge that is too small for a stable solution is raised tenfold until it is not."""
        mean = self._mean_diagonal()
        if not math.isfinite(mean) or mean <= 0:
            raise UserError(f"the mean square of its MLP's activations is {mean}")
        right = self._right.sum()
        _sum_over(right, self._setup.groups.tensor)
        if not math.isfinite(float(right)):
            raise UserError(NOT_FINITE)
        solutions = [self._solution(ridge, mean) for ridge in ridges]
        del self._gram, self._right
        return solutions

    def _mean_diagonal(self) -> float:
        """Of the Gram matrix of all tensor-parallel ranks."""
        group = self._setup.groups.tensor
        total = self._gram.chunk(group.size(), dim=1)[group.rank()].diagonal().sum()
        _sum_over(total, group)
        return float(total) / (group.size() * self._features + self._biased)

    def _solution(self, ridge: float, mean: float) -> Solution:
        factor, ridge = self._factorised(ridge, mean)
        largest, smallest = (self._values(factor, share) for share in (max(SHARES), min(SHARES)))
        return Solution(largest, smallest, ridge, SHARES[0])

    def _values(self, factor: Tensor | None, share: float) -> dict[nn.Parameter, Tensor]:
        """The projection with a share, from ``_factorised``."""
        group, down = self._setup.groups.tensor, self._mlp.down
        target, residual = self._right
        weights = _collected(torch.sub(target, residual, alpha=share), group)
        if factor is not None and weights is not None:
            torch.linalg.solve_triangular(factor, weights, upper=False, out=weights)
            torch.linalg.solve_triangular(factor.mT, weights, upper=True, out=weights)
            if self._biased:
                weights[self._features :: self._features + 1] = weights[-1].clone()
        own = _spread(weights, target, group).div_(share * self._multiplier)
        weight = own[: self._features].t().to(down.weight.dtype, memory_format=torch.contiguous_format)
        values: dict[nn.Parameter, Tensor] = {down.weight: weight}
        if down.bias is not None:
            values[down.bias] = own[-1].to(down.bias.dtype)
        return values

    def _factorised(self, ridge: float, mean: float) -> tuple[Tensor | None, float]:
        """The Cholesky factor, on the first tensor-parallel rank alone, and the ridge that was used.

        The factor takes the place of the collected matrix, which is collected again for another ridge.
        """
        group = self._setup.groups.tensor
        while True:
            gram = self._gram.clone() if group.size() == 1 else _collected(self._gram, group)
            stable = torch.zeros((), dtype=torch.int32, device=self._gram.device)
            if gram is not None:
                diagonal = gram.diagonal()
                if self._biased:  # of the biases only the last rank's was added
                    diagonal[self._features :: self._features + 1][:-1] = mean
                diagonal += ridge * mean
                gram = gram.mT  # symmetric; columns are contiguous now, so that the factor is made in place
                torch.linalg.cholesky_ex(gram, out=(gram, stable))
                stable = (stable == 0) & (diagonal.square().min() > LEAST_PIVOT * mean)
            stable = stable.int()
            if group.size() > 1:
                dist.broadcast(stable, group=group, group_src=0)
            if int(stable):
                return gram, ridge
            del gram
            ridge = max(10 * ridge, 10 * LEAST_PIVOT)

    def then(self, solution: Solution) -> ScaleFit | None:
        """Of the norm after the projection, if there is one; copied weights have no second fit."""
        if self._after is None or solution.share is None:
            return None
        mlp, before, share, eps = self._mlp, self._before, solution.share, self._after.eps
        factor = share * self._multiplier

        def pair(r: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            residual = r.float()
            inverse = inverse_rms(residual, eps)
            added = normalised(mlp(r if before is None else before(r)), eps)
            return added * inverse * factor, target - share * inverse * residual

        return ScaleFit(self._setup, self._after, pair)


class ScaleFit(Fit):
    """Of a norm's scale, feature by feature: sum x y / sum x^2, x the features before the scale and y their target."""

    def __init__(
        self, setup: ModelSetup, norm: RMSNorm, pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        """``pair``: ``attention_half``'s result and the normalised last hidden state -> x and y, all of one shape."""
        self._setup, self._norm, self._pair = setup, norm, pair
        self._sums = torch.zeros(2, len(norm.weight), dtype=torch.float64, device=norm.weight.device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """See ``Fit``."""
        return [self._norm.weight]

    @torch.no_grad()
    def add(self, x: Tensor, last: Tensor, mask: Tensor) -> None:
        """See ``Fit``."""
        shares = self._pair(x, normalised(last, self._norm.eps))
        features, target = (self._setup.gather_sequence(share).flatten(0, 1) for share in shares)
        counted = features * mask[:, None]
        self._sums[0] += (counted * target).sum(dim=0, dtype=torch.float64)
        self._sums[1] += (counted * features).sum(dim=0, dtype=torch.float64)

    def reduce(self) -> None:
        """See ``Fit``."""
        _sum_over(self._sums, self._setup.groups.data)

    def solve(self, ridges: Sequence[float]) -> list[Solution]:
        """See ``Fit``. A feature that is always 0 keeps its scale."""
        products, squares = self._sums
        if not bool(torch.isfinite(self._sums).all()):
            raise UserError(NOT_FINITE)
        scale = torch.where(squares > 0, products / squares, self._norm.scale().double())
        weight = self._norm.weight
        return [Solution({weight: (scale - 1 if self._norm.plus_one else scale).to(weight.dtype)})]


def fit_bytes(rows: int, hidden_size: int, tensor: int) -> tuple[int, int]:
    """Bytes of a fit's sums on one of ``tensor`` ranks, and of what solving takes besides, on the first of them.

    ``rows``: ``Body.fitted_rows``. The solutions, which outlive the sums, take no more than these if there are at least
    as many rows as hidden features.
    """
    return FLOAT64 * -(-rows // tensor) * (rows + 2 * hidden_size), FLOAT64 * rows * (rows + hidden_size)


def number_turns(needed: Sequence[tuple[int, int]], free: int) -> list[int]:
    """The turn, from 0, of each of some fits: those of one turn have their sums in memory together.

    Args:
        needed: of each fit, bytes of its sums, and of solving it.
        free: bytes for the sums of a turn, and for solving one fit at a time. A fit that is too large has a turn alone.
    """
    turns: list[int] = []
    held = solving = 0
    for sums, work in needed:
        if not turns or held + sums + max(solving, work) > free:
            turns.append(turns[-1] + 1 if turns else 0)
            held = solving = 0
        else:
            turns.append(turns[-1])
        held, solving = held + sums, max(solving, work)
    return turns


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``[..., size]`` float32 -> ``[..., 1]``."""
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def normalised(x: Tensor, eps: float) -> Tensor:
    """What an RMSNorm makes of ``x`` before its scale, in float32."""
    wide = x.float()
    return wide * inverse_rms(wide, eps)


def _blocks(own: Tensor, group: dist.ProcessGroup) -> Iterator[Tensor]:
    """Each rank's tensor of the same shape in turn, from the first on."""
    for rank in range(group.size()):
        block = own if rank == group.rank() else torch.empty_like(own)
        if group.size() > 1:
            dist.broadcast(block, group=group, group_src=rank)
        yield block


def _collected(rows: Tensor, group: dist.ProcessGroup) -> Tensor | None:
    """The rows of all ranks, on the first rank; None on the others. One rank's are the tensor itself."""
    if group.size() == 1:
        return rows
    whole = rows.new_empty(group.size() * len(rows), rows.shape[1]) if group.rank() == 0 else None
    parts = None if whole is None else list(whole.split(len(rows)))
    dist.gather(rows, parts, group=group, group_dst=0)
    return whole


def _spread(whole: Tensor | None, like: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of ``_collected``; ``like``: a tensor of the shape of this rank's rows."""
    if whole is not None and group.size() == 1:
        return whole
    own = torch.empty_like(like)
    dist.scatter(own, None if whole is None else list(whole.split(len(own))), group=group, group_src=0)
    return own


def _sum_over(sums: Tensor, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
