"""What the measurements give: plain figures, as they are in the JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SideResult:
    """One side of a tuning step.

    Attributes:
        tokens_per_second: from the median step.
        step_seconds: each measured step.
        peak_memory: bytes, of the whole process (of its device memory on a GPU).
        flops: counted operations of one step.
        matmul_share: ``flops`` per second, as a share of the matmul rate measured meanwhile.
        losses: of each exit before the first step.
        grad_norm: over all exits in the first step, before clipping.
    """

    tokens_per_second: float
    step_seconds: list[float]
    peak_memory: int
    flops: int
    matmul_share: float
    losses: list[float]
    grad_norm: float


@dataclass(frozen=True)
class StepComparison:
    """Our step and plain PyTorch's, of one dtype and number of exits.

    Attributes:
        exits: their layers.
        matmul_rate: operations per second of the fastest of the step's own matrix products.
        speed_ratio: our tokens per second over plain PyTorch's.
        memory_ratio: our peak memory over plain PyTorch's.
    """

    dtype: str
    exits: list[int]
    ours: SideResult
    plain: SideResult
    matmul_rate: float
    speed_ratio: float
    memory_ratio: float


@dataclass(frozen=True)
class LossComparison:
    """The exit loss alone; ``None`` where this torch has no ``linear_cross_entropy``.

    Attributes:
        seconds: median of each way: ``ours``, ``plain``, ``linear_cross_entropy``.
        losses: what each way computes.
        speed_ratio: how many times as long each of the other ways takes.
        matmul_share: as in ``SideResult``, of ours.
    """

    dtype: str
    seconds: dict[str, float | None]
    losses: dict[str, float | None]
    speed_ratio: dict[str, float | None]
    matmul_share: float


@dataclass(frozen=True)
class TuneBenchmark:
    """All of ``benchmark tune``."""

    machine: dict[str, Any]
    model: dict[str, Any]
    steps: list[StepComparison]
    exit_loss: list[LossComparison]


@dataclass(frozen=True)
class LoadBenchmark:
    """All of ``benchmark load``; times are medians in seconds, rates bytes per second.

    Attributes:
        load_ratio: time to load over time to read into one small buffer that is used again and again, so that the
            bytes are gone: the least that reading can cost.
        load_keep_ratio: time to load over time to read into new memory of the same size, page faults included.
        hash_ratio: time that hashing takes on top, over time to load.
        hash_rate: of hashing the model from its files, on all cores.
        sha256_rate: of SHA-256 in memory, on one core.
    """

    machine: dict[str, Any]
    model: dict[str, Any]
    load_seconds: float
    read_seconds: float
    keep_seconds: float
    hash_seconds: float
    load_rate: float
    read_rate: float
    keep_rate: float
    hash_rate: float
    sha256_rate: float
    load_ratio: float
    load_keep_ratio: float
    hash_ratio: float
