"""Reads pickles as data. Classes and functions in them are kept as names; nothing is imported, called or run."""

from __future__ import annotations

import io
import pickle  # noqa: TID251  reads only what --trust-checkpoint allows
from collections.abc import Callable, Collection
from typing import Any, ClassVar

from megatron_ee.errors import CheckpointError, shown

MAX_PICKLE = 256 * 2**20  # bytes; the description of a rank's file has a few hundred KB
_REFUSED = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
"""Opcodes that access objects of this process or allocate unbounded memory. Checkpoints do not use them."""


class Inert:
    """Placeholder for the result of a class or function that a pickle calls: its name and arguments.

    Every name has its own subclass. A call in the pickle creates an instance of it.

    Attributes:
        origin: module and name.
        args: arguments of the call.
        state: its state; None if none was given.
    """

    __slots__ = ("args", "state")
    origin: ClassVar[tuple[str, str]] = ("", "")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __repr__(self) -> str:
        return f"<{'.'.join(self.origin)}>"

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore items of an unknown kind of dict."""

    def append(self, item: Any) -> None:
        """Ignore items of an unknown kind of list."""

    add = append


class Mapping(dict[Any, Any]):
    """An ``OrderedDict`` in the pickle. Attributes of a state dict are ignored."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Getattr(Inert):
    """Stands for ``getattr`` where a pickle may name members of enums. Python 3.11.0 to 3.11.3 pickle them with it."""

    __slots__ = ()
    origin = ("builtins", "getattr")
    enums: ClassVar[dict[str, Collection[str]]]

    def __new__(cls, enum: Any = None, name: Any = None, *more: Any) -> Any:
        plain = isinstance(enum, type) and issubclass(enum, Inert) and type(name) is str and not more
        if not plain or name not in cls.enums.get(".".join(enum.origin), ()):
            raise _foreign(".".join(cls.origin))
        return enum(name)


class _GuardedUnpickler(pickle._Unpickler):
    # The Python unpickler, because the C unpickler allocates and touches a memo table of the size that a pickle claims.
    # Every object that BUILD can reach has a __setstate__, so BUILD never sets arbitrary attributes.
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _REFUSED}

    def __init__(
        self,
        data: bytes,
        load_storage: Callable[[Any], Any],
        known: Collection[str] | None,
        enums: dict[str, Collection[str]] | None,
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._load_storage, self._known = load_storage, known
        self._named: dict[tuple[str, str], type] = {}
        if enums is not None:
            self._named[_Getattr.origin] = type("Getattr", (_Getattr,), {"__slots__": (), "enums": enums})

    def find_class(self, module: str, name: str) -> type:
        origin = (module, name)
        if origin not in self._named:
            full = f"{module}.{name}"
            if self._known is not None and not any(full == one or full.startswith(f"{one}.") for one in self._known):
                raise _foreign(full)
            inert = type("Inert", (Inert,), {"__slots__": (), "origin": origin})
            self._named[origin] = Mapping if origin == ("collections", "OrderedDict") else inert
        return self._named[origin]

    def persistent_load(self, pid: Any) -> Any:
        return self._load_storage(pid)


def _foreign(name: str) -> ValueError:
    return ValueError(f"names {name}, which is not allowed in such a file")


def unpickle(
    data: bytes,
    where: str,
    load_storage: Callable[[Any], Any] | None = None,
    known: Collection[str] | None = None,
    enums: dict[str, Collection[str]] | None = None,
) -> Any:
    """Read a pickle: numbers, strings, lists, tuples, dicts, and ``Inert`` for everything else.

    Args:
        data: the pickle.
        where: name of its source, for messages.
        load_storage: returns objects that are stored outside the pickle (persistent ids). None allows no such objects.
        known: allowed modules, and classes or functions as ``module.name``; None allows all.
        enums: allowed members of enums, by the enum's ``module.name``, that the pickle may get with ``getattr``.

    Raises:
        CheckpointError: it is too large, not a pickle, or contains a name or an opcode that is not allowed.
    """
    if len(data) > MAX_PICKLE:
        raise CheckpointError(f"{where}: {len(data)} bytes are too many for a description; at most {MAX_PICKLE}")

    def nothing(pid: Any) -> Any:
        raise ValueError("refers to a tensor outside the pickle")

    try:
        return _GuardedUnpickler(data, load_storage or nothing, known, enums).load()
    except Exception as error:  # a hostile pickle can cause any of these
        what = f"{type(error).__name__} {error}"
        raise CheckpointError(
            f"{where}: not a pickle of a checkpoint: {shown(what)}; refused, and no code in it was run"
        ) from None
