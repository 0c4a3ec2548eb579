"""A stand-in for what megatron-core wants from CUDA, and imports of it without warnings.

megatron-core is written for CUDA. Without an accelerator, the stand-in lets its unchanged code run on the CPU with
gloo. ``stand_in`` replaces a few ``torch.cuda`` functions while it is open, at no cost per operation. ``translated``
redirects ``device="cuda"`` to the CPU around the calls that construct or step megatron-core's optimizer. Both do
nothing on a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from megatron_ee.platform.accelerator import has_accelerator


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


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Run megatron-core calls that allocate on ``"cuda"``. Used only around these, since the mode slows every
    operation."""
    if has_accelerator():
        yield
        return
    with _CudaOnCpu():
        yield


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
