"""Device, dtype and communication backend: the differences between CPU and GPU.

megatron-core is written for CUDA. Without an accelerator, a small stand-in lets its unchanged code run on the CPU with
gloo. ``stand_in`` replaces a few ``torch.cuda`` functions while it is open, at no cost per operation. ``translated``
redirects ``device="cuda"`` to the CPU around the calls that construct or step megatron-core's optimizer. Both do
nothing on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import resource
import shutil
import socket
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from megatron_ee.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST_LOAD = 0.5
"""CPUs that others must use before a machine is called busy."""


def has_accelerator() -> bool:
    """Whether a CUDA device can be used."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_accelerator() else torch.device("cpu")


def cpp_compiler() -> tuple[str, bool]:
    """The C++ compiler that torch uses, ``CXX`` or g++, and whether it exists."""
    compiler = os.environ.get("CXX", "g++")
    return compiler, shutil.which(compiler) is not None


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


class DeviceTimer:
    """Measures the device work that is queued between its creation and ``stop``. The host waits only in ``seconds``.

    It measures only work of the current stream, not waits for other processes.
    """

    def __init__(self) -> None:
        self._start = self._end = mark()

    def stop(self) -> None:
        """End of the measured work."""
        self._end = mark()

    def seconds(self) -> float:
        """Duration of the work; waits until the work is done."""
        return seconds_between(self._start, self._end)


def mark() -> Any:
    """The current point of the current stream; the current time without an accelerator."""
    if not has_accelerator():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, second: Any) -> float:
    """Time from one mark to a later one of the same stream; waits until the device has reached the later one."""
    if isinstance(second, float):
        return float(second - first)
    second.synchronize()
    return float(first.elapsed_time(second)) / 1000


class Clock:
    """Converts marks of any stream to seconds of ``time.perf_counter``."""

    def __init__(self) -> None:
        self._origin = mark()
        synchronize()
        self._time = time.perf_counter()

    def time(self, of: Any) -> float:
        """When the device reached a mark; waits until it has."""
        return of if isinstance(of, float) else self._time + seconds_between(self._origin, of)


class DeviceQueue:
    """Device work of this thread beside its other work, in order. On a CPU it is done at once."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if has_accelerator() else None

    @contextlib.contextmanager
    def after_this(self) -> Iterator[None]:
        """What is queued while the context is open begins after all that the caller has queued so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def reads(self, tensor: torch.Tensor) -> None:
        """Memory of ``tensor`` that is freed is not reused before the work that is queued so far has ended."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def join(self) -> None:
        """What the caller queues from now on comes after all work here."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def finish(self) -> None:
        """Wait until all work here has ended."""
        if self._stream is not None:
            self._stream.synchronize()


class SideStream:
    """Work beside the computation, in order, on a thread of its own. On a GPU also its device work is beside it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "side stream")
        self._stream = torch.cuda.Stream() if has_accelerator() else None

    def start(self, work: Callable[[], None], memory: torch.Tensor) -> SideWork:
        """Start work that writes to ``memory``. Its device work begins after all that the caller has queued so far."""
        stream = self._stream
        if stream is None:
            return SideWork(self._thread.submit(work))
        before, done = torch.cuda.Event(), torch.cuda.Event()
        before.record()
        memory.record_stream(stream)  # otherwise memory that is freed might be reused before the work has ended

        def run() -> None:
            with torch.cuda.stream(stream):
                stream.wait_event(before)
                work()
                done.record()

        return SideWork(self._thread.submit(run), done)


class SideWork:
    """Work that ``SideStream.start`` has started."""

    def __init__(self, queued: Future[None], done: Any = None) -> None:
        self._queued, self._done = queued, done

    def wait(self) -> None:
        """What the caller queues from now on comes after this work. Raises what the work raised."""
        self._queued.result()
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)


class Staging:
    """Where host code writes what belongs into a device's memory: a page-locked buffer, or on a CPU that memory.

    Attributes:
        copies: whether ``send`` has something to do.
    """

    def __init__(self, like: torch.Tensor, instead: str) -> None:
        """``like``: memory of the largest size. ``instead``: see ``host_buffer``."""
        self._bytes = host_buffer(like.nbytes, instead) if queues_work(like.device) else None
        self.copies = self._bytes is not None
        self._sent: Any = None

    def room(self, memory: torch.Tensor) -> torch.Tensor:
        """Host memory like ``memory``, to write into. Waits until it is free."""
        if self._bytes is None:
            return memory
        if self._sent is not None:
            self._sent.synchronize()
        return self._bytes[: memory.nbytes].view(memory.dtype)

    def send(self, memory: torch.Tensor) -> None:
        """Copy what was written into ``room`` to ``memory``, on the current stream."""
        if self._bytes is not None:
            memory.copy_(self._bytes[: memory.nbytes].view(memory.dtype), non_blocking=True)
            self._sent = torch.cuda.Event()
            self._sent.record()


def queues_work(device: torch.device) -> bool:
    """Whether a device queues operations. Reading a result then waits for all earlier operations."""
    return device.type != "cpu"


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


def host_name() -> str:
    """Name of this machine. Processes with equal names share its memory."""
    return socket.gethostname()


def free_host_memory() -> int:
    """Bytes of this machine's memory that are free, or can be made so without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


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


@contextlib.contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """While open, imports of these packages fail as if they were not installed, unless they are already loaded."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Import megatron-core without warnings about missing optional packages or CUDA, without apex and torch's compiler.

    megatron-core imports any package named apex, with or without kernels; ``parallel.adam`` finds out which one works.
    It also marks fused functions for compilation, none of which are used here. This would make every process load the
    compiler, which is two thirds of the imports' time and half of their memory.
    """
    uncompiled = mock.patch.object(torch, "compile", lambda function: function)
    # A CUDA build of torch warns if it finds a CUDA compiler, but no GPU.
    no_cuda = mock.patch.object(logging.getLogger("torch.utils.cpp_extension"), "disabled", True)
    with warnings.catch_warnings(), _hidden("apex", "amp_C"), uncompiled, no_cuda:
        warnings.filterwarnings("ignore", module=r"megatron\.core")
        warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex).*")
        # Warnings about its decorators, which torch has since renamed.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        yield


def without_compiler(*methods: Any) -> None:
    """Let methods that torch excludes from its compiler run without loading it, for the rest of the process.

    torch loads it at their first call, to mark them: 25 MB per process, although nothing is compiled.
    """
    for method in methods:
        plain = getattr(method, "__wrapped__", method)
        if not hasattr(plain, "__dynamo_disable"):
            plain.__dynamo_disable = plain  # torch caches the compiler's result in this attribute


def quiet_runtime() -> None:
    """Silence warnings of megatron-core, and of torch because of it, for the rest of the process.

    Users cannot act on them: they are about older names of collectives, and a gradient that its optimizer reads.
    """
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed.*")
    warnings.filterwarnings("ignore", message=".*The .grad attribute of a Tensor that is not a leaf.*")
    warnings.filterwarnings("ignore", message=".*tp_group is None, using default tp group.*")
    warnings.filterwarnings("ignore", message=".*set the environment variable CUDA_DEVICE_MAX_CONNECTIONS.*")
    # Data may be opened before the processes are connected.
    warnings.filterwarnings("ignore", message="Could not determine rank from torch.distributed.*")
    # From 0.18 on it advises to compute the layout of its buffers in advance, which gives the same layout.
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)


class _CudaOnCpu(TorchFunctionMode):
    """Factory calls that name a CUDA device use the CPU; ``Tensor.type()`` returns the name as on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        wanted = kwargs.get("device")
        if wanted is not None and str(wanted).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Run megatron-core calls that allocate on ``"cuda"``. Used only around these, since the mode slows every
    operation."""
    if has_accelerator():
        yield
        return
    with _CudaOnCpu():
        yield


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Let megatron-core's code run without an accelerator, until the context closes."""
    if has_accelerator():
        yield
        return
    with contextlib.ExitStack() as stack:
        for name, value in {
            "current_device": lambda: torch.device("cpu"),
            "current_stream": lambda *_: None,  # megatron-core would wait here for CUDA graphs, which are not used
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        yield
