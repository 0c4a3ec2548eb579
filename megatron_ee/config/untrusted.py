"""Reads untrusted files: strict JSON of bounded size, and nothing outside the directory."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ee.errors import CheckpointError, ConfigError, DamagedError, shown, storage_errors

MAX_FILE = 64 * 2**20  # bytes; ten times the manifest of a model of many TB
MAX_VALUES = 2**22
"""More values than any checkpoint has. A value takes 2 bytes in the file and up to 100 in memory."""


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Yield a read descriptor of a regular file. A pipe or device is refused, since opening it could block.

    Raises:
        CheckpointError: it cannot be opened, or reading from it fails in the body.
    """
    with storage_errors(path, "read"):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CheckpointError(f"{path}: is not a regular file")
            yield fd
        finally:
            os.close(fd)


def read_exactly(fd: int, out: memoryview, position: int, path: Path) -> None:
    """Fill ``out`` with the file's bytes from ``position``. One ``preadv`` may return fewer bytes than requested.

    Raises:
        DamagedError: the file ends too early.
    """
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], position + done)
        if count == 0:
            raise DamagedError(f"{path}: truncated: expected {position + len(out)} bytes, found {position + done}")
        done += count


def read_whole(fd: int, path: Path, limit: int) -> bytes:
    """The content of an open file of at most ``limit`` bytes.

    Raises:
        CheckpointError: it is larger.
        DamagedError: it gets shorter while it is read.
    """
    size = os.fstat(fd).st_size
    if size > limit:
        raise CheckpointError(f"{path}: {size} bytes are too many for this file; at most {limit} are read")
    data = bytearray(size)
    read_exactly(fd, memoryview(data), 0, path)
    return bytes(data)


def allowed_root(directory: Path) -> Path:
    """The folder that a directory's files must resolve into: itself, or its Hugging Face hub repository folder.

    In a download cache of the Hugging Face hub, ``models--ORG--NAME/snapshots/REVISION/x`` is a symbolic link to
    ``models--ORG--NAME/blobs/HASH``, so links there may lead anywhere inside the ``models--ORG--NAME`` folder.
    """
    real = Path(os.path.realpath(directory))
    for parent in real.parents:
        in_snapshot = (parent / "snapshots") in real.parents and os.path.isdir(parent / "blobs")
        if parent.name.startswith("models--") and in_snapshot:
            return parent
    return real


def check_confined(file: Path, root: Path, where: Path | None = None) -> None:
    """Refuse a path that is not a regular file inside ``root``, with symbolic links followed.

    Args:
        root: from ``allowed_root``.
        where: name of the file's container for messages; its directory by default.

    Raises:
        CheckpointError: the path leads outside, is missing, or is a directory, pipe or device.
    """
    where = file.parent if where is None else where
    target = Path(os.path.realpath(file))
    if not target.is_relative_to(root):
        raise CheckpointError(f"{where}: {shown(file.name)} leads outside the model directory, to {target}; refused")
    with storage_errors(file, "read"):
        if not target.exists():
            raise CheckpointError(f"{where}: file {shown(file.name)} is missing; download the model again")
        if not target.is_file():
            raise CheckpointError(f"{where}: {shown(file.name)} is not a regular file")


def read_json(path: Path, limit: int = MAX_FILE) -> Any:
    """The JSON of a file of at most ``limit`` bytes.

    Raises:
        CheckpointError: no such file, or too large.
        DamagedError: not valid JSON.
    """
    with open_regular(path) as fd:
        data = read_whole(fd, path, limit)
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> Any:
    """Strict JSON: UTF-8, no repeated key in an object, only finite numbers.

    Raises:
        DamagedError: naming ``where``.
    """
    if data.startswith(b"version https://git-lfs"):
        raise DamagedError(f"{where}: is a git-lfs pointer, not the file itself; run `git lfs pull`")
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > MAX_VALUES:
        raise DamagedError(f"{where}: holds about {values} values; at most {MAX_VALUES} are read")
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not valid JSON: {error}") from None


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of JSON lines that are not blank, with their numbers from 1.

    Raises:
        OSError: it cannot be read.
    """
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            yield number, line


def whole_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file of JSON lines with file and line, one at a time; blank ones are left out.

    So is what follows the last line end, which a kill has torn.

    Raises:
        CheckpointError: it cannot be read.
        DamagedError: a line has more than ``MAX_FILE`` bytes.
    """
    with open_regular(path) as fd, open(fd, "rb", closefd=False) as file:
        number = 0
        while line := file.readline(MAX_FILE):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) >= MAX_FILE:
                    raise DamagedError(f"{path}:{number}: a line of more than {MAX_FILE} bytes")
                return
            if line.strip():
                yield f"{path}:{number}", line


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        UserError: not UTF-8, not valid JSON, or no object.
    """
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8: byte {error.start} of the line: {error.reason}") from None
    found = parse_json(line, "line")
    if not isinstance(found, dict):
        raise ConfigError(f"must be a JSON object, not {shown(found)}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} appears twice")
    return result


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value
