"""Device, dtype and communication backend: the only module that knows CPU from GPU.

megatron-core is written for CUDA. Where no accelerator is present, a small stand-in lets its unchanged code run on
the CPU with gloo: ``stand_in`` replaces a few ``torch.cuda`` functions for as long as it is open, which costs nothing
per operation, and ``translated`` sends ``device="cuda"`` to the CPU around the calls that construct or step
megatron-core's optimizer. Both do nothing on a GPU.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def has_accelerator() -> bool:
    """Whether a CUDA device can be used."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_accelerator() else torch.device("cpu")


def communication_backend() -> str:
    """The ``torch.distributed`` backend for that device."""
    return "nccl" if has_accelerator() else "gloo"


def synchronize() -> None:
    """Wait for queued device work, so that a host clock measures it."""
    if has_accelerator():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Largest memory held so far, in bytes: of the device, or of the process where there is none."""
    if has_accelerator():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence what megatron-core says at import about optional packages that are not installed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.core")
        warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex).*")
        # Of its decorators, which torch has renamed since.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        yield


def quiet_runtime() -> None:
    """Silence, for the rest of the process, what megatron-core's calls make torch say at every step.

    None of it is for a user to act on: older names of collectives, and a gradient that its optimizer looks for.
    """
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed.*")
    warnings.filterwarnings("ignore", message=".*The .grad attribute of a Tensor that is not a leaf.*")
    warnings.filterwarnings("ignore", message=".*tp_group is None, using default tp group.*")


class _CudaOnCpu(TorchFunctionMode):
    """Factory calls that name a CUDA device go to the CPU; ``Tensor.type()`` answers as on a GPU."""

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
    """Run megatron-core calls that allocate on ``"cuda"``; a mode left on would slow every operation."""
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
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        yield
