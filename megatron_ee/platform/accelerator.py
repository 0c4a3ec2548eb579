"""What this process computes on, and what differs between CPU and GPU in how it computes."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST_LOAD = 0.5
"""CPUs that others must use before a machine is called busy."""


def has_accelerator() -> bool:
    """Whether a CUDA device can be used."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_accelerator() else torch.device("cpu")


def device_name() -> str:
    """What this process computes on, in words."""
    return str(torch.cuda.get_device_name()) if has_accelerator() else f"CPU, {torch.get_num_threads()} threads"


def for_other_thread(work: Callable[[], None]) -> Callable[[], None]:
    """``work`` for another thread, on this thread's device and with its settings of the compiler.

    Both are per thread: the settings, such as dynamo's limit of recompilations, are context variables.
    """
    index = torch.cuda.current_device() if has_accelerator() else None
    context = contextvars.copy_context()

    def run() -> None:
        if index is not None:
            torch.cuda.set_device(index)
        context.run(work)

    return run


def queues_work(device: torch.device) -> bool:
    """Whether a device queues operations. Reading a result then waits for all earlier operations."""
    return device.type != "cpu"


def communication_backend() -> str:
    """The ``torch.distributed`` backend for this process's device."""
    return "nccl" if has_accelerator() else "gloo"


def synchronize() -> None:
    """Wait for queued device work, so that a clock on the host measures it."""
    if has_accelerator():
        torch.cuda.synchronize()


def to_device(tensor: torch.Tensor, where: torch.device | None = None) -> torch.Tensor:
    """Copy a host tensor to a device through page-locked memory, without making the host wait.

    Each call costs one copy and some microseconds, so combine values into one tensor.

    Args:
        where: the device; None for this process's.
    """
    where = device() if where is None else where
    return tensor.pin_memory().to(where, non_blocking=True) if queues_work(where) else tensor


def loads_kernels_lazily() -> bool:
    """Whether a kernel is loaded at its first use, which may wait for all queued device work."""
    return has_accelerator()


def cpp_compiler() -> tuple[str, bool]:
    """The C++ compiler that torch uses, ``CXX`` or g++, and whether it exists."""
    compiler = os.environ.get("CXX", "g++")
    return compiler, shutil.which(compiler) is not None


def cached_bytes() -> int:
    """Size in bytes of pieces that several operations process in turn, so that they stay in a CPU cache.

    An accelerator does not need this; larger pieces are always better there.
    """
    return 2**62 if has_accelerator() else 4 * 2**20


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions that torch uses. Without them torch multiplies row by row."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_slow(dtype: str) -> bool:
    """Whether this device is several times slower in ``dtype`` than in float32, for more than one row."""
    return dtype == "bfloat16" and not has_accelerator() and not multiplies_bfloat16()


def groups_heads(dtype: torch.dtype) -> bool:
    """Whether a fused attention kernel supports fewer key-value heads than query heads (``enable_gqa``).

    On a GPU the kernels for 16-bit types do. The kernel for float32 does not: torch would compute all scores at once.
    """
    return not (has_accelerator() and dtype == torch.float32)


@contextlib.contextmanager
def tuning_attention() -> Iterator[None]:
    """While open, scaled dot product attention uses the fastest kernel for tuning: flash, then cuDNN's.

    Every microbatch has the same shape, so cuDNN plans once per kind of layer.
    """
    with _attention_kernels("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        yield


@contextlib.contextmanager
def inference_attention() -> Iterator[None]:
    """While open, scaled dot product attention uses the fastest kernel for inference, but never cuDNN's.

    cuDNN makes a plan per shape, and the number of keys grows with every token.
    """
    with _attention_kernels("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        yield


@contextlib.contextmanager
def _attention_kernels(*names: str) -> Iterator[None]:
    """Allow only these kernels; torch uses the first one that supports a call. On a CPU torch chooses.

    The setting is global to the process. Backward uses the kernel of its forward pass.
    """
    if not has_accelerator():
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True):
        yield


@functools.cache
def warn_if_busy() -> None:
    """Say once, on stderr of the first rank, if other processes use CPUs that this one has threads for.

    A product then waits for its slowest thread. Measuring takes a fifth of a second, and only where the load is high.
    """
    threads, cpus = torch.get_num_threads(), os.cpu_count() or 1
    if has_accelerator() or threads == 1 or os.environ.get("RANK", "0") != "0" or os.getloadavg()[0] < LEAST_LOAD:
        return
    import psutil

    busy = psutil.cpu_percent(interval=0.2) / 100 * cpus
    if busy >= LEAST_LOAD and threads > cpus - busy + LEAST_LOAD:
        fewer = max(1, int(cpus - busy + LEAST_LOAD))
        print(
            f"other processes use {busy:.1f} of this machine's {cpus} CPUs; {threads} threads that wait for each other "
            f"can then be a hundred times slower than {fewer}; set OMP_NUM_THREADS={fewer}",
            file=sys.stderr,
            flush=True,
        )
