"""What the measurements give: plain figures, as they are in the JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_ee.benchmark.saving import SavingBenchmark
from megatron_ee.parallel.memory import Memory


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


@dataclass(frozen=True)
class Span:
    """What a stage did: ``kind`` as in ``tuning.schedule.Event``; seconds from the first forward of the step."""

    kind: str
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class StageShare:
    """One stage of a pipeline; seconds are those of one microbatch, shares those of the step's time.

    Attributes:
        layers: their numbers.
        exits: layers of those hosted here.
        forward_seconds: in its layers.
        teach_seconds: in the final exit, on the last stage with layers and with distillation.
        exits_seconds: in its exits.
        busy: measured share in which it computed.
        expected: that share by the plan's simulation of the schedule, from these seconds.
        planned: the same from counted FLOPs, as a run prints it before it starts.
    """

    layers: list[int]
    exits: list[int]
    forward_seconds: float
    teach_seconds: float
    exits_seconds: float
    busy: float
    expected: float
    planned: float


@dataclass(frozen=True)
class LinkTraffic:
    """What one stage sent another.

    Attributes:
        source: sending stage.
        target: receiving stage.
        verdicts: a teacher's, which alone go backward.
        bytes: per microbatch.
        least: bytes per microbatch that have to travel.
        ratio: of the two.
    """

    source: int
    target: int
    verdicts: bool
    bytes: float
    least: int
    ratio: float


@dataclass(frozen=True)
class PipelineBenchmark:
    """All of ``benchmark pipeline``.

    Attributes:
        simulated: the stages waited instead of computing.
        step_seconds: each measured step from its first forward to its last exit.
        efficiency: mean of the stages' busy shares.
        expected: the same by the plan's simulation from measured seconds.
        planned: the same from counted FLOPs.
        reference: ``M / (M + P - 1)``.
        timeline: by stage, what it did in the median step.
    """

    machine: dict[str, Any]
    model: dict[str, Any]
    simulated: bool
    step_seconds: list[float]
    stages: list[StageShare]
    links: list[LinkTraffic]
    efficiency: float
    expected: float
    planned: float
    reference: float
    timeline: list[list[Span]]


@dataclass(frozen=True)
class RankMemory:
    """One rank; bytes.

    Attributes:
        stage: its place in the pipeline.
        tensor_rank: its place among the ranks that share the stage.
        libraries: what the process held before the stage was made; on a GPU, of its memory.
        measured: most that it held beyond that.
        planned: what was counted.
        ratio: measured over planned.
    """

    stage: int
    tensor_rank: int
    libraries: int
    measured: int
    planned: Memory
    ratio: float


@dataclass(frozen=True)
class MemoryBenchmark:
    """All of ``benchmark memory``.

    Attributes:
        resident: what the allocator keeps of freed memory counts too.
        together: bytes of all ranks at their peaks, libraries included; pages that they share are counted for each.
        step_seconds: of the median step, of its slowest rank.
        losses: of each step, of each exit.
    """

    machine: dict[str, Any]
    model: dict[str, Any]
    resident: bool
    ranks: list[RankMemory]
    together: int
    step_seconds: float
    losses: list[list[float]]


@dataclass(frozen=True)
class Direction:
    """One direction of a conversion; times in seconds of each round, from files that are not in the page cache.

    Attributes:
        to: format written: ``parallel`` or ``hf``.
        seconds: to convert.
        copy_seconds: of ``cp -r`` of what is read, until the copy is on disk.
        hash_seconds: of SHA-256 of that copy, on all cores.
        ratio: median time to convert over that to copy and hash.
        rate: bytes converted per second.
        libraries: bytes of memory that the process held before.
        memory: most that it held beyond that.
        resident: largest share of the files that was in the page cache after all.
    """

    to: str
    seconds: list[float]
    copy_seconds: list[float]
    hash_seconds: list[float]
    ratio: float
    rate: float
    libraries: int
    memory: int
    resident: float


@dataclass(frozen=True)
class Conversion:
    """A model to a parallel checkpoint and back.

    Attributes:
        layout: what the parallel checkpoint is cut for.
        ratio: as in ``Direction``, of both together.
        ratio_target: what that should be at most.
        memory_target: bytes that ``Direction.memory`` should be at most: the largest tensor's and a constant.
        identical: tensors that came back byte for byte: all of them, or this would not exist.
    """

    model: dict[str, Any]
    layout: dict[str, int]
    directions: list[Direction]
    ratio: float
    ratio_target: float
    memory_target: int
    identical: int


@dataclass(frozen=True)
class ShardedLoad:
    """Loading on all ranks at the same time; times in seconds of each round, of the slowest rank; bytes.

    Attributes:
        format: what is loaded: ``hf`` or ``parallel``.
        verified: checksums are compared when loading, and taken when reading.
        cold: the page cache was told to forget the files before.
        resident: share of the files that was in the page cache.
        read_seconds: to read what each rank needs into new memory for all of it.
        reuse_seconds: to read it into small buffers that are used again and again, so that it is gone.
        ratio: median time to load over that to read into new memory.
        reuse_ratio: the same over that to read into small buffers.
        rate: bytes needed per second of loading, all ranks together.
        needed: of each rank.
        read: by each rank when loading, from wherever.
        read_ratio: read over needed, of the rank where it is largest.
        disk: of that, from the disk, all ranks together.
    """

    format: str
    verified: bool
    cold: bool
    resident: float
    load_seconds: list[float]
    read_seconds: list[float]
    reuse_seconds: list[float]
    ratio: float
    reuse_ratio: float
    rate: float
    needed: list[int]
    read: list[int]
    read_ratio: float
    disk: int


@dataclass(frozen=True)
class ShardedLoads:
    """Loads of one model on tensor-parallel ranks.

    Attributes:
        tensor: number of ranks.
        ratio_target: what each load's ``ratio`` should be at most.
    """

    model: dict[str, Any]
    tensor: int
    ratio_target: float
    loads: list[ShardedLoad]


@dataclass(frozen=True)
class ConvertBenchmark:
    """All of ``benchmark convert``; None is a part that was not asked for."""

    machine: dict[str, Any]
    convert: Conversion | None
    load: ShardedLoads | None
    save: SavingBenchmark | None
