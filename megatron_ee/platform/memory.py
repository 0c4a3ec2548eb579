"""Memory of this process's device and of its machine: how much is free and used, page-locked, and given back."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import socket
import sys
import weakref
from pathlib import Path, PurePosixPath

import torch

from megatron_ee.errors import UserError
from megatron_ee.platform.accelerator import device, has_accelerator

CONTROL_GROUP_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By controllers in /proc/self/cgroup, of version 2 and 1: folder; files of the limit and of the use; key of pages that
can be dropped, in memory.stat."""


def host_buffer(nbytes: int, instead: str = "checkpoint.asynchronous to false") -> torch.Tensor:
    """Bytes in host memory, uint8 [nbytes]; page-locked if there is an accelerator, for asynchronous copies.

    Not ``pin_memory=True``, which rounds up to a power of two. The memory is unlocked when this tensor object is freed,
    so keep it as long as its views.

    Args:
        instead: a setting that avoids the buffer, for the message.

    Raises:
        UserError: the system does not let this process lock so much memory.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    if has_accelerator() and nbytes > 0:
        pointer, runtime = buffer.data_ptr(), torch.cuda.cudart()
        status = int(runtime.cudaHostRegister(pointer, nbytes, 0))
        if status != 0:
            raise UserError(
                f"{nbytes / 1e9:.1f} GB of host memory cannot be page-locked (CUDA error {status}); set {instead}"
            )
        weakref.finalize(buffer, runtime.cudaHostUnregister, pointer).atexit = False
    return buffer


def peak_memory() -> int:
    """Peak memory so far, in bytes: of the device, or of the process if there is no accelerator."""
    if has_accelerator():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's value on Linux, since a child process starts with its parent's peak there.
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def host_name() -> str:
    """Name of this machine. Processes with equal names share its memory."""
    return socket.gethostname()


def memory_name() -> str:
    """Name of the memory that this process uses: its device's, or its machine's.

    Processes with the same memory get equal names. Device numbers are not enough, because each process may see only its
    own device, as number 0.
    """
    host = host_name()
    return f"{host} {torch.cuda.get_device_properties(device()).uuid}" if has_accelerator() else host


def free_memory(processes: int = 1) -> int:
    """Bytes that this process can still allocate: of its device, or of the machine if there is no accelerator.

    Args:
        processes: number of processes with the same ``memory_name``.
    """
    if not has_accelerator():
        return free_host_memory() // processes
    # What torch keeps of freed tensors, such as a KV cache, is free for this process.
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) // processes + kept


def free_host_memory() -> int:
    """Bytes of host memory that this process can still allocate without swapping: what the machine has free, or less if
    a control group limits the process."""
    import psutil

    free, limits = int(psutil.virtual_memory().available), control_group_limits()
    return max(0, min([free, *(limit - used for limit, used in limits)]))


def control_group_limits(
    process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[int, int]]:
    """The memory limits of this process's control groups on Linux, which containers and batch systems set.

    Args:
        process: the file that lists the groups.
        root: where their file system is mounted.

    Returns:
        Bytes of each limit, each with the bytes in use under it, without file pages that can be dropped.
    """
    found = []
    try:
        lines = process.read_text().splitlines()
    except OSError:  # another system
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in CONTROL_GROUP_FILES:
            continue
        folder, limit, used, reclaimable = CONTROL_GROUP_FILES[controllers]
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):  # in a container the path may be the one outside of it
            place = root / folder / group
            with contextlib.suppress(OSError, ValueError):  # no such group, or its limit is "max"
                statistics = dict(entry.split() for entry in (place / "memory.stat").read_text().splitlines())
                spare = int(statistics.get(reclaimable, 0))
                found.append((int((place / limit).read_text()), int((place / used).read_text()) - spare))
    return found


def zero_(tensor: torch.Tensor) -> None:
    """Fill a contiguous tensor with zeros. On a CPU its memory is returned to the system until it is written again."""
    if tensor.is_cpu and sys.platform == "linux" and _give_back(tensor):
        return
    tensor.zero_()


def _give_back(tensor: torch.Tensor) -> bool:
    """Return the memory of a tensor to the system on a Linux host, which gives zeroed pages later; False if this fails.

    It works for private anonymous memory, which all allocators use.
    """
    page, begin = resource.getpagesize(), tensor.data_ptr()
    first, end = -(-begin // page) * page, (begin + tensor.nbytes) // page * page
    if end <= first:
        return False
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED) != 0:
        return False
    edges = tensor.view(torch.uint8).view(-1)
    edges[: first - begin].zero_()
    edges[end - begin :].zero_()
    return True


def return_freed_memory(hidden_size: int = 256) -> None:
    """On a CPU, return large tensors to the system when they are freed, for the rest of the process.

    By default glibc adapts to keep freed blocks of up to 32 MB for reuse. With tensors of many sizes these accumulate:
    173 of 2836 MB, measured in a tuning step with 4 exits. New pages cost 4% of the time instead. Settings of the
    user's environment take precedence.

    Args:
        hidden_size: of the model. A wider model computes more per page. Up to 256, tensors from 4 MB on are returned
            (from 1 MB on, tuning would be a fifth slower); for 1024 and more, tensors from 1 MB on.
    """
    m_mmap_threshold = -3  # of malloc.h
    if not has_accelerator() and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(m_mmap_threshold, min(4 << 20, max(1 << 20, (1 << 30) // hidden_size)))
