"""Records what is done on the fake device: launches, waits of the host, memory, and tensors on wrong devices."""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from itertools import cycle
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_ee

PACKAGE = f"{Path(megatron_ee.__file__).parent}/"
PASSED_OVER = f"{PACKAGE}platform/"
"""Directory of files whose functions act for their callers: the wait of ``platform.synchronize`` is the caller's."""
NOT_LAUNCHED = ("empty", "new_empty", "_unsafe_view", "lift_fresh", "detach", "alias", "is_pinned", "_pin_memory")
"""Operations besides views that launch nothing: their names, or the beginnings of these."""


class Watch(TorchDispatchMode):
    """A dispatch mode around a ``FakeTensorMode``.

    Reading a value of a fake tensor (``item``, ``tolist``, ``bool``) is answered from a fixed series.

    Attributes:
        device: the one that this rank may use.
        syncs: waits of the host for the device, by place in the package (``tuning/step.py tuning_step``) and kind:
            ``read``, ``upload``, ``download``, ``size`` (of a result that depends on values) or ``synchronize``.
        launches: operations on the device that launch kernels, by name, collectives included.
        places: the same by place in the package.
        sent: bytes that this rank sends, by ``send`` and by the size of the group of a reduction; see ``_count_sent``.
        attention: attention backends that were chosen, see ``kernels``.
        faults: tensors on wrong devices.
        live: bytes held on the device.
        peak: the most there were since ``restart``.
        composition: bytes held when there were ``explained`` of them, by the place that made them.
    """

    def __init__(self, device: int, explained: int | None = None) -> None:
        super().__init__()
        self.device, self.explained = torch.device("cuda", device), explained
        self.faults: list[str] = []
        self.composition: dict[str, int] = {}
        self.backends: dict[str, str] = {}
        self.live = 0
        self._floats, self._integers = cycle([0.9]), cycle([1])
        self._storages: dict[int, tuple[int, str]] = {}
        self._pinned: set[int] = set()
        self.restart()

    def restart(self) -> None:
        """Count from here; what is held stays."""
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.peak = self.live

    def answer(self, floats: list[float], integers: list[int]) -> None:
        """What reading values gives from now on, over and over."""
        self._floats, self._integers = cycle(floats), cycle(integers)

    def wait(self, kind: str) -> None:
        """The host waits for the device here."""
        self.syncs[place(), kind] += 1

    def read(self, tensor: Tensor) -> bool | float | int:
        """A value, without counting."""
        if tensor.dtype == torch.bool:
            return True
        return next(self._floats) if tensor.is_floating_point() else next(self._integers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # there composite operations arrive whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.namespace == "c10d":
            self._check_group(args, tensors)
            self._count_sent(func, args, tensors)
        pinned = kwargs.pop("pin_memory", False)
        handler = _HANDLERS.get(func)
        result = func(*args, **kwargs) if handler is None else handler(self, func, args, kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._hold(tensor)
            if pinned:
                self._remember_pinned(tensor)
        if any(tensor.is_cuda for tensor in (*made, *tensors)) and _launches(func):
            self.launches[str(func)] += 1
            self.places[place()] += 1
        return result

    def _hold(self, tensor: Tensor) -> None:
        """Follow the memory of a tensor that may be new."""
        if not tensor.is_cuda:
            return
        if tensor.device != self.device:
            self.faults.append(f"{place()}: a tensor on {tensor.device}, not {self.device}")
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._storages or nbytes == 0:
            return
        self._storages[key] = nbytes, "" if self.explained is None else place(2)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key).atexit = False
        if self.live == self.explained and not self.composition:
            for size, where in self._storages.values():
                self.composition[where] = self.composition.get(where, 0) + size

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Follow memory that is taken or given back while its tensor stays."""
        if storage._cdata in self._storages:
            before, where = self._storages[storage._cdata]
            self._storages[storage._cdata] = storage.nbytes(), where
            self.live += storage.nbytes() - before
            self.peak = max(self.peak, self.live)

    def _drop(self, key: int) -> None:
        self.live -= self._storages.pop(key)[0]

    # ---------------------------------------------------------------------------------------- operations that may wait

    def _read_one(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        (tensor,) = args
        if tensor.is_cuda:
            self.wait("read")
        elif getattr(tensor, "constant", None) is not None or not isinstance(tensor, FakeTensor):
            return func(*args, **kwargs)
        return self.read(tensor)

    def _equal(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        if args[0].is_cuda:
            self.wait("read")
        return True

    def _copy(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        makes = func is torch.ops.aten._to_copy.default
        source = args[0] if makes else args[1]
        if source.device.type == result.device.type:
            return result
        downloads, host = source.is_cuda, result if source.is_cuda else source
        non_blocking = kwargs.get("non_blocking", False) or (not makes and args[2:] == (True,))
        # What torch itself makes for a download that is not waited for is page-locked.
        if not non_blocking or not ((makes and downloads) or self._is_pinned(host)):
            self.wait("download" if downloads else "upload")
        return result

    def _sized_by_values(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """One element is found."""
        if args[0].is_cuda:
            self.wait("size")
        if func is torch.ops.aten.masked_select.default:
            return args[0].new_empty(1)
        return torch.zeros((1, args[0].dim()), dtype=torch.int64, device=args[0].device)

    def _index(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        masked = [index is not None and index.dtype == torch.bool for index in args[1]]
        if not any(masked):
            return func(*args, **kwargs)
        if args[0].is_cuda:
            self.wait("size")
        found = [
            torch.zeros(1, dtype=torch.int64, device=index.device) if mask else index
            for index, mask in zip(args[1], masked, strict=True)
        ]
        return func(args[0], found, *args[2:], **kwargs)

    def _pin(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        copy = torch.empty_like(args[0])
        self._remember_pinned(copy)
        return copy

    def _ask_pinned(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        return self._is_pinned(args[0])

    def _lift(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if self._is_pinned(args[0]):
            self._remember_pinned(result)
        return result

    def _remember_pinned(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata).atexit = False

    def _is_pinned(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor):
            return tensor.untyped_storage()._cdata in self._pinned
        with torch._C._DisableTorchDispatch():
            return tensor.is_pinned()

    def _check_group(self, args: Any, tensors: list[Tensor]) -> None:
        """A collective's tensors must be where its group is."""
        for group in _groups(args):
            on_host = self.backends.get(group.group_name) == "gloo"
            for tensor in tensors:
                if tensor.is_cuda == on_host:
                    kind = "the host" if on_host else "the device"
                    self.faults.append(f"{place()}: a tensor on {tensor.device} in a collective of {kind}")

    def _count_sent(self, func: OpOverload, args: Any, tensors: list[Tensor]) -> None:
        """As a ring: a tensor goes around it once to be gathered or scattered, twice to be summed everywhere."""
        rounds = _ROUNDS.get(func.__name__.partition(".")[0])
        for group in _groups(args):
            if func.__name__.startswith("send"):
                self.sent["send"] += sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)
            elif rounds is not None and self.backends.get(group.group_name) != "gloo":
                most = max(tensor.nbytes for tensor in tensors)
                self.sent[f"group of {group.size()}"] += int(rounds * (group.size() - 1) / group.size() * most)


_ROUNDS = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}
_aten = torch.ops.aten
_HANDLERS: dict[OpOverload, Any] = {
    _aten._local_scalar_dense.default: Watch._read_one,
    _aten.item.default: Watch._read_one,
    _aten.is_nonzero.default: Watch._read_one,
    _aten.equal.default: Watch._equal,
    _aten._to_copy.default: Watch._copy,
    _aten.copy_.default: Watch._copy,
    _aten.nonzero.default: Watch._sized_by_values,
    _aten.masked_select.default: Watch._sized_by_values,
    _aten.index.Tensor: Watch._index,
    _aten._pin_memory.default: Watch._pin,
    _aten.is_pinned.default: Watch._ask_pinned,
    _aten.lift_fresh.default: Watch._lift,
}


def _groups(args: Any) -> list[dist.ProcessGroup]:
    """The process groups among the arguments of a collective."""
    objects = (arg for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
    return [dist.ProcessGroup.unbox(each) for each in objects]


def _is_group(argument: torch.ScriptObject) -> bool:
    return argument._type().qualified_name().endswith("c10d.ProcessGroup")


@functools.cache
def _launches(func: OpOverload) -> bool:
    return not func.is_view and not func.__name__.startswith(NOT_LAUNCHED)


def place(depth: int = 1) -> str:
    """The innermost functions of the package that are running, such as ``tuning/step.py tuning_step``."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < depth:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE) and not file.startswith(PASSED_OVER):
            found.append(_name(frame))
        frame = frame.f_back
    return " < ".join(found) or "elsewhere"


def _name(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_filename.removeprefix(PACKAGE)} {code.co_qualname.split('.<locals>')[0]}"
