"""A journal of long work: one JSON line per finished piece, so that a killed command continues where it was.

``FILE.info.json`` says what the pieces are made from. Work is continued only if that is the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.atomic import write_all, write_json
from megatron_ee.config.untrusted import read_json
from megatron_ee.errors import CheckpointError, ConfigError, storage_errors

SYNC_SECONDS = 10.0
Entry = Mapping[str, Any]
DIGESTS = {
    "model_sha256": "model",
    "adapter_sha256": "adapter",
    "tokenizer_sha256": "tokenizer or chat template",
    "prompts_sha256": "prompts",
    "records_sha256": "records",
}
"""Keys of an info that are compared, with their names in messages. ``settings`` is compared key by key."""


@dataclass
class Journal:
    """A growing file of entries. ``open_journal`` makes it.

    Attributes:
        path: the file.
        key: gives the key of an entry; it raises LookupError, TypeError or ValueError if it is none of this work's.
        places: by key, the position and the size of the entry's line.
    """

    path: Path
    key: Callable[[Entry], Hashable]
    _fd: int
    places: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    _size: int = 0
    _synced: float = 0.0

    def append(self, entry: Entry) -> None:
        """Write an entry.

        Raises:
            CheckpointError: the disk is full or the like.
        """
        line = encoded_line(entry)
        with storage_errors(self.path, "write"):
            write_all(self._fd, memoryview(line))
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._fd)
                self._synced = time.monotonic()
        self._place(self.key(entry), len(line))

    def read(self, key: Hashable) -> Any:
        """The entry with this key."""
        position, size = self.places[key]
        return json.loads(os.pread(self._fd, size, position))

    def entries(self) -> Iterator[Any]:
        """All entries in their order."""
        return map(self.read, list(self.places))

    def _place(self, key: Hashable, size: int) -> None:
        self.places[key] = self._size, size
        self._size += size

    def _take_over(self) -> None:
        """Read the entries of an earlier run, up to a line that a kill has torn."""
        with storage_errors(self.path, "read"), open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                self._place(self._checked_key(line, number), len(line))
        with storage_errors(self.path, "write"):
            os.ftruncate(self._fd, self._size)
            os.lseek(self._fd, self._size, os.SEEK_SET)

    def _checked_key(self, line: bytes, number: int) -> Hashable:
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            key = self.key(json.loads(line))
            if key not in self.places:
                return key
        raise CheckpointError(
            f"{self.path}, line {number}: does not answer one of the prompts that are left; give --overwrite to begin "
            "again"
        )


@contextlib.contextmanager
def open_journal(
    path: Path, about: Mapping[str, Any], key: Callable[[Entry], Hashable], *, resume: bool, overwrite: bool
) -> Iterator[Journal]:
    """Begin a journal, or continue one.

    Args:
        path: of the journal.
        about: what its entries are made from: ``made_by``, digests (see ``DIGESTS``), ``settings``, and anything for
            the reader.
        key: see ``Journal``.
        resume: continue a journal if there is one.
        overwrite: replace a journal.

    Raises:
        ConfigError: there is a journal, and neither ``resume`` nor ``overwrite`` is given; or it was begun with
            something else.
        CheckpointError: it cannot be read or written, or another process writes it.
    """
    begun = check_journal(path, resume=resume, overwrite=overwrite)
    with storage_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(fd, path)
        journal = Journal(path, key, fd)
        if begun and resume:
            _check_same(path, about)
            journal._take_over()
        else:
            with storage_errors(path, "write"):
                os.ftruncate(fd, 0)
            write_json(info_file(path), about)
        yield journal
    finally:
        os.close(fd)


def check_journal(path: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether there is a journal with entries.

    Raises:
        ConfigError: there is one, and neither ``resume`` nor ``overwrite`` is given.
    """
    begun = path.is_file() and path.stat().st_size > 0
    if begun and not (resume or overwrite):
        raise ConfigError(
            f"--output: {path} is unfinished; give --resume to continue it, or --overwrite to begin again"
        )
    return begun


def encoded_line(entry: Entry) -> bytes:
    """A line of JSON. Half a surrogate pair has no bytes of its own; JSON spells it as an escape."""
    return f"{json.dumps(entry, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace")


def info_file(path: Path) -> Path:
    """The file that says what ``path`` is made from."""
    return path.with_name(f"{path.name}.info.json")


def read_info(path: Path, made_by: str) -> dict[str, Any]:
    """What ``path`` is made from; empty if ``made_by`` did not write that."""
    with contextlib.suppress(CheckpointError):
        info = read_json(info_file(path))
        if isinstance(info, dict) and info.get("made_by") == made_by:
            return info
    return {}


def changes(recorded: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, in words."""
    found = [
        f"{'other' if name.endswith('s') else 'another'} {name}"
        for key, name in DIGESTS.items()
        if recorded.get(key) != about.get(key)
    ]
    before, now = recorded.get("settings"), about["settings"]
    if not isinstance(before, dict):
        return [*found, "unknown settings"]
    return found + [
        f"{key} {json.dumps(before.get(key))}, not {json.dumps(now.get(key))}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{path}: another process is writing it; wait for it or choose another output") from None
    except OSError:  # a file system without locks
        pass


def _check_same(path: Path, about: Mapping[str, Any]) -> None:
    """Refuse to continue a journal that was begun with something else."""
    info = read_info(path, about["made_by"])
    if not info:
        raise ConfigError(
            f"--resume: {info_file(path)} is missing or damaged, so {path} cannot be continued; give --overwrite to "
            "begin again"
        )
    found = changes(info, about)
    if found:
        raise ConfigError(
            f"--resume: {path} was begun with {', '.join(found)}; give the same, or --overwrite to begin again"
        )
