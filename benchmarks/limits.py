"""What the machine can do at best: products of matrices, reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_ee import platform

READ = 256 * 2**20  # bytes that no cache holds


def seconds(work: Callable[[], Any]) -> float:
    """How long ``work`` takes, queued device work included."""
    platform.synchronize()
    started = time.perf_counter()
    work()
    platform.synchronize()
    return time.perf_counter() - started


def matmul_rate(dtype: str, size: int = 1024) -> float:
    """Multiplications and additions per second of a product of two square matrices, now."""
    a, b = (torch.randn(size, size, device=platform.device()).to(platform.DTYPES[dtype]) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(5))


def read_rate() -> float:
    """Bytes of a large float32 matrix per second that a product with a vector reads, now."""
    matrix = torch.ones(READ // (4 * 4096), 4096, device=platform.device())
    vector = torch.ones(4096, device=platform.device())
    return READ / min(seconds(lambda: torch.mv(matrix, vector)) for _ in range(3))
