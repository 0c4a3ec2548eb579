"""Products and attention of a few tokens, by the fastest way that there is for them on this processor.

On an accelerator, and in float32, that is what torch itself takes. In bfloat16 CPUs multiply few rows fastest with a
product of our own, ``bfloat16``, and let few tokens attend with it, where it was built. The rest is torch's, in two
ways: on CPUs with instructions of that type oneDNN reads a weight once for all rows, but reorders it first; on others
torch goes over the weight once for each row, and many rows are multiplied faster in float32.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ee import platform
from megatron_ee.model import bfloat16

ONE_BY_ONE = 3 * 2**19
"""Bytes that a CPU reads while oneDNN begins a product of bfloat16, whose weight it has to reorder first."""
WIDENED_ROWS = 16
"""Rows from which on a CPU without instructions of bfloat16 multiplies faster in float32 (measured with AVX2)."""
OUR_ROWS = 64
"""Rows from which on ``bfloat16`` takes as long as float32 (measured with AVX2), or as oneDNN (with AMX, AVX-512)."""
WIDENED_BYTES = 4 * 2**20
"""Bytes of a weight that are made float32 at a time."""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 that oneDNN uses."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def gains_from_ours(dtype: torch.dtype) -> bool:
    """Whether few rows of a dtype are multiplied faster on this device once ``bfloat16`` is built."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return False  # nobody has tried others
    return dtype == torch.bfloat16 and not platform.has_accelerator()


def is_slow(dtype: str) -> bool:
    """Whether tuning in a dtype takes several times as long here as in float32: bfloat16 does, on CPUs of that kind."""
    return dtype == "bfloat16" and not platform.has_accelerator() and not multiplies_bfloat16()


def _is_cpu_bfloat16(weight: Tensor) -> bool:
    """Whether it is of the kind that torch multiplies late or row by row: what is said here of dtypes is of these."""
    return weight.is_cpu and weight.dtype == torch.bfloat16


def _widens(rows: int, weight: Tensor) -> bool:
    few = OUR_ROWS if bfloat16.built else WIDENED_ROWS
    return rows >= few and _is_cpu_bfloat16(weight) and not multiplies_bfloat16()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: ``[rows, in]`` -> ``[rows, out]``."""
    if not _is_cpu_bfloat16(weight):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return bfloat16.product(x, weight, bias) if bfloat16.built else F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return F.linear(x, weight, bias)
    if bfloat16.built and len(x) < OUR_ROWS:
        return bfloat16.product(x, weight, bias)
    if _widens(len(x), weight):
        return _widened_product(x, weight, bias)
    with torch_products() if (len(x) - 1) * weight.nbytes < ONE_BY_ONE else contextlib.nullcontext():
        return F.linear(x, weight, bias)


def write_product(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """``x weight^T`` into ``out``, ``[rows, out]``, which is no part of a graph."""
    if _widens(len(x), weight):
        out.copy_(_widened_product(x, weight, None))
    else:
        torch.mm(x, weight.t(), out=out)


def _widened_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32, rounded at the end; a part of the weight at a time, that the caches hold it."""
    wide, result = x.float(), x.new_empty(len(x), len(weight))
    at_once = max(1, WIDENED_BYTES // (4 * weight.shape[1]))
    room = wide.new_empty(min(at_once, len(weight)), weight.shape[1])
    for start in range(0, len(weight), at_once):
        part = weight[start : start + at_once]
        some = None if bias is None else bias[start : start + at_once].float()
        result[:, start : start + at_once] = F.linear(wide, room[: len(part)].copy_(part), some)
    return result


def compiles(tokens: int, weight: Tensor) -> bool:
    """Whether compiled code is the fastest for so many tokens.

    Where a CPU would multiply bfloat16 row by row, what it spares elsewhere is worth twice as much as ``ONE_BY_ONE``.
    """
    if not _is_cpu_bfloat16(weight):
        return True
    if bfloat16.built:
        return tokens < OUR_ROWS
    if not multiplies_bfloat16():
        return not _widens(tokens, weight)
    return (tokens - 1) * weight.nbytes < 2 * ONE_BY_ONE


@contextlib.contextmanager
def torch_products() -> Iterator[None]:
    """Let the products of compiled code with one row be torch's own, not oneDNN's, as ``product`` has them."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def attend(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Attention of the newest token of each row to all that is kept of it; of several where ``attends_several``.

    Args:
        query: ``[rows * tokens, kv_heads, queries per key-value head, head_dim]``, one row after another.
        keys: of each row, ``[1, kv_heads, kept, head_dim]``, its tokens' at the end; ``values`` too.

    Returns:
        ``[rows * tokens, heads * head_dim]``.
    """
    if _attends(query, query.shape[-1]):
        return bfloat16.attend(query, keys, values)
    parts = [_attend(*each) for each in zip(query.split(1), keys, values, strict=True)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(len(query), -1)


def attends_several(tokens: int, like: Tensor, head_dim: int) -> bool:
    """Whether ``attend`` takes so many tokens of a row, in causal order: where torch does not have tiles for them."""
    return _attends(like, head_dim) and not bfloat16.has_tiles() and tokens < OUR_ROWS


def _attends(like: Tensor, head_dim: int) -> bool:
    return bfloat16.built and _is_cpu_bfloat16(like) and head_dim % bfloat16.HEAD_FEATURES == 0


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    if not (_is_cpu_bfloat16(query) and query.shape[2] == 1):
        return F.scaled_dot_product_attention(query, keys, values)
    if torch.compiler.is_compiling():
        # Fused, as sums of products in float32: 2 to 5 times as fast as torch's kernel with 100 to 4000 keys.
        # Scaled last: the compiler takes the usual order for a softmax, and then looks for infinities.
        scores = (query.float() * keys.float()).sum(-1, keepdim=True)
        shares = ((scores - scores.amax(-2, keepdim=True)) * query.shape[-1] ** -0.5).exp()
        context = (shares * values.float()).sum(-2, keepdim=True) / shares.sum(-2, keepdim=True)
        return context.to(query.dtype)
    # A single query takes 1.5 to 1.8 times as long as two (measured with 16 to 32 heads over 100 to 2000 keys).
    return F.scaled_dot_product_attention(query.expand(-1, -1, 2, -1), keys, values)[:, :, :1]
