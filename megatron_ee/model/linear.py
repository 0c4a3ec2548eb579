"""Norms and tensor-parallel linears, adapted from megatron-core."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ee import platform
from megatron_ee.model.setup import ModelSetup
from megatron_ee.parallel.core_versions import mark_sharded

with platform.quiet_imports():
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        gather_from_sequence_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``, ``[..., in]`` -> ``[..., out]``, as one matrix product.

    With a batch of one, ``[seq, 1, in]`` may have strides for which ``F.linear`` computes each token separately.
    """
    result = F.linear(x.flatten(0, -2), weight, bias)
    return result.view(*x.shape[:-1], result.shape[-1])


class ColumnLinear(ColumnParallelLinear):
    """Linear with output features sharded over the tensor-parallel ranks.

    Unlike megatron-core's, it computes no gradient for an input that needs none, such as a tap. This saves a matrix
    product and a reduction.
    """

    def __init__(self, setup: ModelSetup, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(
            in_features,
            out_features,
            config=setup.config,
            init_method=_left_empty,
            bias=bias,
            tp_group=setup.groups.tensor,
        )
        mark_sharded(self.weight, 0)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[seq, batch, in]`` (``[seq / tp, ...]`` with sequence parallelism) -> ``[seq, batch, out / tp]``."""
        if torch.is_grad_enabled() and x.requires_grad:
            return super().forward(x)[0]
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        return product(x, self.weight, self.bias)


class RowLinear(RowParallelLinear):
    """Linear with input features sharded over the tensor-parallel ranks; the output is summed over the ranks."""

    def __init__(self, setup: ModelSetup, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(
            in_features,
            out_features,
            config=setup.config,
            init_method=_left_empty,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=setup.groups.tensor,
        )
        mark_sharded(self.weight, 1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[seq, batch, in / tp]`` -> ``[seq, batch, out]`` (``[seq / tp, ...]`` with sequence parallelism)."""
        if self.sequence_parallel or (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)):
            return super().forward(x)[0]
        if self.tp_group.size() == 1:
            return product(x, self.weight, self.bias)
        summed = reduce_from_tensor_model_parallel_region(product(x, self.weight), group=self.tp_group)
        return summed if self.bias is None else summed + self.bias


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), marked for sequence parallelism as megatron-core expects."""

    def __init__(self, setup: ModelSetup, size: int, *, sharded_sequence: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=setup.config.params_dtype))
        self.weight.sequence_parallel = sharded_sequence and setup.config.sequence_parallel  # type: ignore[attr-defined]
        self.eps, self.plus_one = setup.architecture.norm_eps, setup.architecture.norm_plus_one

    def scale(self) -> Tensor:
        """``[size]`` float32, the factor of each feature."""
        weight = self.weight.detach().float()
        return 1 + weight if self.plus_one else weight.clone()

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``; the last dimension is normalised in float32."""
        if self.plus_one:  # Gemma multiplies in float32, before rounding
            return F.rms_norm(x.float(), (x.shape[-1],), 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class ShardedRMSNorm(nn.Module):
    """RMSNorm over features (and weights) that are sharded over the tensor-parallel ranks."""

    def __init__(self, setup: ModelSetup, size: int) -> None:
        """Allocate this rank's share of a norm over ``size`` features."""
        super().__init__()
        self.size, self.group, self.eps = size, setup.groups.tensor, setup.architecture.norm_eps
        self.weight = nn.Parameter(torch.empty(size // self.group.size(), dtype=setup.config.params_dtype))
        mark_sharded(self.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size / tp]`` -> the same shape and dtype, normalised in float32."""
        wide = x.float()
        squares = wide.square().sum(dim=-1, keepdim=True)
        if self.group.size() > 1:
            squares = _SumOverRanks.apply(squares, self.group)
        return (wide * torch.rsqrt(squares / self.size + self.eps) * self.weight.float()).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in forward. Each rank uses the sum separately, so backward all-reduces the gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _left_empty(weight: Tensor) -> Any:
    """Initialiser for megatron-core that does nothing. Every weight is loaded, or initialised by its exit."""
    return weight
