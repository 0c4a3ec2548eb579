"""Fused operations that a CUDA build of torch has and a CPU build would take apart: attention, norm, SiLU's backward.

Which attention backend is taken follows ``select_sdp_backend`` of torch 2.11 to 2.13 for an A100 (sm80).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from .watch import Watch

_take_apart = F.scaled_dot_product_attention


def _not_run(*_: Tensor) -> Tensor:
    raise NotImplementedError("fake tensors have no values")


# A kernel for a device is preferred to the composite one, whose intermediate results would be counted as memory.
_kernels = torch.library.Library("aten", "IMPL")
_kernels.impl("silu_backward", _not_run, "CUDA")


@contextlib.contextmanager
def fused(watch: Watch) -> Iterator[None]:
    """Let attention and norms be single operations, and count the attention backends in ``watch``."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        backend = attention_backend(query, key, attn_mask, is_causal, enable_gqa)
        watch.attention[backend] += 1
        if backend == "flash":
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if backend == "efficient":
            bias = _bias(attn_mask, query, key)
            grad = torch.is_grad_enabled() and query.requires_grad
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, grad, dropout_p, is_causal, scale=scale
            )[0]
        return _take_apart(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
        return _rms_norm(x, weight)[0]

    with mock.patch.object(F, "scaled_dot_product_attention", attention), mock.patch.object(F, "rms_norm", norm):
        yield


@torch.library.custom_op("fake_cuda::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``x``, normalised, and what backward needs of each row, ``[..., 1]`` float32. It has no values."""
    raise NotImplementedError


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("fake_cuda::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of the weight."""
    raise NotImplementedError


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs
    ctx.save_for_backward(x, output[1], weight)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    return _rms_norm_backward(grad, *ctx.saved_tensors)


_rms_norm.register_autograd(_backward, setup_context=_save)


def attention_backend(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> str:
    """``flash``, ``efficient`` or ``math``, the last of which holds all scores."""
    backends = torch.backends.cuda
    shared = enable_gqa and query.shape[-3] != key.shape[-3]
    half = query.dtype in (torch.bfloat16, torch.float16)
    uneven = is_causal and query.shape[-2] != key.shape[-2]
    if backends.flash_sdp_enabled() and half and mask is None and not uneven and query.shape[-1] <= 256:
        return "flash"
    if backends.mem_efficient_sdp_enabled() and not shared:
        return "efficient"
    return "math"


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What the memory-efficient kernel adds to the scores."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    return mask.expand(*query.shape[:-1], key.shape[-2])
