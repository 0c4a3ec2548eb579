"""Makes this process any rank of a run of any size, on machines of eight CUDA devices."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # which fake tensors need, and which reads what is patched here
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ee import platform
from megatron_ee.platform import queues
from megatron_ee.testing.deepspeed import stand_in_deepspeed

from . import shim
from .kernels import fused
from .watch import Watch

with platform.quiet_imports():
    from megatron.core.distributed import param_and_grad_buffer

DEVICE_BYTES = 80 * 10**9


class FakeTensors(FakeTensorMode):
    """Fake tensors, among which real ones on the host may be mixed."""

    avoid_device_init = True  # torch.tensor(..., device="cuda") is then made on the host and copied, as fakes

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)


@contextlib.contextmanager
def as_rank(rank: int, processes: int, explained: int | None = None) -> Iterator[Watch]:
    """Everything inside believes that it is rank ``rank`` of ``processes`` on CUDA, and that the others answer.

    Args:
        rank: of all processes; the machines have ``shim.DEVICES`` devices each.
        processes: of the run.
        explained: see ``Watch``.
    """
    library, device = shim.load(), rank % shim.DEVICES
    watch = Watch(device, explained)
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": str(device),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    library.fake_cuda_set_device(0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.multiple(torch.cuda, **_cuda(watch, library)))
        stack.enter_context(mock.patch.multiple(dist, **_distributed(watch, rank, processes)))
        stack.enter_context(mock.patch.object(torch, "tensor", _on_current_device(torch.tensor)))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", _tolist(watch)))
        stack.enter_context(mock.patch.object(FakeTensor, "record_stream", lambda *_: None))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", _resize(watch)))
        stack.enter_context(mock.patch.dict(sys.modules, stand_in_deepspeed()))
        stack.enter_context(mock.patch.object(platform, "host_buffer", _host_buffer))
        stack.enter_context(mock.patch.object(queues, "host_buffer", _host_buffer))
        stack.enter_context(mock.patch.object(queues, "ThreadPoolExecutor", _NoThread))
        # The fake process group has no coalesced collectives.
        stack.enter_context(mock.patch.object(param_and_grad_buffer, "_coalescing_manager", _coalescing))
        stack.enter_context(fused(watch))
        stack.enter_context(FakeTensors())
        stack.enter_context(watch)
        yield watch


def _cuda(watch: Watch, library: ctypes.CDLL) -> dict[str, Any]:
    """What ``torch.cuda`` answers."""

    def set_device(device: torch.device | int) -> None:
        library.fake_cuda_set_device(device if isinstance(device, int) else device.index)

    class Stream:
        """The one stream, or another: work on all of them is over at once."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: object) -> None: ...

        def synchronize(self) -> None:
            watch.wait("synchronize")

        def record_event(self, event: Event | None = None) -> Event:
            return event or Event()

        def wait_event(self, event: Event) -> None: ...

        def wait_stream(self, stream: Stream) -> None: ...

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def synchronize(self) -> None:
            watch.wait("synchronize")

        def record(self, stream: Stream | None = None) -> None: ...

        def wait(self, stream: Stream | None = None) -> None: ...

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: Event) -> float:
            return 1.0

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: shim.DEVICES,
        "current_device": library.fake_cuda_get_device,
        "set_device": set_device,
        "synchronize": lambda *_: watch.wait("synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (DEVICE_BYTES - watch.live, DEVICE_BYTES),
        "max_memory_allocated": lambda *_: watch.peak,
        "memory_allocated": lambda *_: watch.live,
        "memory_reserved": lambda *_: watch.live,
        "get_device_name": lambda *_: "fake",
        "get_device_properties": lambda device: SimpleNamespace(uuid=f"GPU-{device}"),
        "get_device_capability": lambda *_: (8, 0),
        "Stream": Stream,
        "Event": Event,
        "current_stream": Stream,
        "default_stream": Stream,
        "stream": lambda stream: stream,
    }


def _distributed(watch: Watch, rank: int, processes: int) -> dict[str, Any]:
    """What ``torch.distributed`` does: groups are fake ones, and all other ranks send what this one does."""
    form, join = dist.new_group, dist.init_process_group

    def new_group(ranks: Any = None, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        group = form(ranks, *args, backend="fake", **kwargs)
        if isinstance(group, dist.ProcessGroup):
            watch.backends[group.group_name] = backend or "nccl"
        return group

    def init_process_group(backend: str | None = None, *_: Any, **__: Any) -> None:
        assert backend == "nccl", f"on CUDA the process group must be NCCL's, not {backend}"
        join("fake", store=FakeStore(), rank=rank, world_size=processes)

    def all_gather_object(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    return {
        "new_group": new_group,
        "init_process_group": init_process_group,
        "all_gather_object": all_gather_object,
    }


def _on_current_device(make: Any) -> Any:
    """``torch.tensor``, which takes "cuda" as the first device where a fake mode is on, not as the current one."""

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None and str(device) == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        return make(*args, device=device, **kwargs)

    return tensor


def _resize(watch: Watch) -> Any:
    """``UntypedStorage.resize_``, which takes or gives back memory of a tensor that stays."""
    resize = torch.UntypedStorage.resize_

    def resized(self: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
        resize(self, nbytes)
        watch.resized(self)
        return self

    return resized


class _NoThread:
    """An executor that runs its work at once: a fake mode belongs to one thread."""

    def __init__(self, *_: Any) -> None: ...

    def submit(self, work: Any) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(work())
        return done


def _host_buffer(nbytes: int, instead: str = "") -> torch.Tensor:
    """``platform.host_buffer``, which locks real memory."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _tolist(watch: Watch) -> Any:
    """``Tensor.tolist``, which waits once for all values."""

    def values(tensor: torch.Tensor, shape: tuple[int, ...]) -> Any:
        return [values(tensor, shape[1:]) for _ in range(shape[0])] if shape else watch.read(tensor)

    def tolist(self: torch.Tensor) -> Any:
        if self.is_cuda:
            watch.wait("read")
        return values(self, tuple(self.shape))

    return tolist


class _Done:
    def wait(self) -> None: ...


@contextlib.contextmanager
def _coalescing(*_: Any, **__: Any) -> Iterator[_Done]:
    yield _Done()
