"""Input files of ``prepare-data``, read in pieces that can be tokenised independently.

The pieces depend only on the files, so the corpus does not depend on the number of processes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_ee.errors import DataError

PIECE_BYTES = 1 << 20
JSON_LINES = (".jsonl", ".ndjson", ".json")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A text is cut where a line ends and the next begins without white space: no tokenizer joins tokens across this point.
_CUT = re.compile(rb"\n(?=[^\s])")


def is_chat(path: Path) -> bool:
    """Whether a file is of JSON lines, and its first one, blank lines aside, is an object with ``messages``.

    Other errors than those of reading are left to the tokenisation.

    Raises:
        DataError: the file cannot be read.
    """
    if path.suffix not in JSON_LINES:
        return False
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            first = json.loads(next((line for line in file if line.strip()), ""))
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "messages" in first


@dataclass(frozen=True)
class TextPiece:
    """Part of a file: whole lines.

    Attributes:
        path: the file.
        lines: whether each line is a JSON object; otherwise the piece is part of one document.
        offset: start of the piece in the file, in bytes, after a byte-order mark.
        length: number of its bytes.
        size: number of bytes of the file that the piece covers, with a byte-order mark.
        line: number of its first line, from 1.
        first: whether it is the first piece of the file.
        last: whether it is the last piece of the file.
    """

    path: Path
    lines: bool
    offset: int
    length: int
    size: int
    line: int
    first: bool
    last: bool

    def read(self) -> bytes:
        """The bytes of the piece.

        Pieces travel to other processes without them: a process that is ended while its parent fills the pipe to it
        would keep the parent waiting for ever under Python before 3.11.5.

        Raises:
            DataError: the file cannot be read, or is shorter than it was.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if len(data) < self.length:
            raise DataError(f"{self.path}: became shorter while it was read; run again when nothing writes to it")
        return data


def check_inputs(inputs: list[Path]) -> int:
    """Total size in bytes of the input files.

    Raises:
        DataError: there is no input, or one is missing, empty or not a file.
    """
    if not inputs:
        raise DataError("--input: give at least one file")
    total = 0
    for path in inputs:
        if not path.exists():
            raise DataError(f"{path}: no such input file")
        if not path.is_file():
            raise DataError(f"{path}: not a file; give the files themselves")
        size = path.stat().st_size
        if size == 0:
            raise DataError(f"{path}: the file is empty; leave it out, or give another")
        total += size
    return total


def read_pieces(path: Path, lines: bool, piece_bytes: int | None = None) -> Iterator[TextPiece]:
    """The pieces of a file in order, each about ``piece_bytes`` (default: ``PIECE_BYTES``) long.

    Raises:
        DataError: the file cannot be read or holds only a byte-order mark.
    """
    empty = True
    try:
        with path.open("rb") as file:
            for piece in _pieces(file, path, lines, piece_bytes or PIECE_BYTES):
                empty = False
                yield piece
    except OSError as error:
        raise _unreadable(path, error) from None
    if empty:
        raise DataError(f"{path}: holds no text; leave it out, or give another")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror or error}")


def _pieces(file: IO[bytes], path: Path, lines: bool, piece_bytes: int) -> Iterator[TextPiece]:
    mark = file.read(len(_BYTE_ORDER_MARK))
    skipped = len(mark) if mark == _BYTE_ORDER_MARK else 0
    buffer = b"" if skipped else mark
    offset, line, first = skipped, 1, True
    searched = 0  # the buffer holds no cut from piece_bytes up to here
    while True:
        block = file.read(max(piece_bytes, len(buffer)))  # doubling, so that a very long line is not copied repeatedly
        buffer += block
        cut = len(buffer) if not block else _cut(buffer, lines, max(piece_bytes, searched))
        while cut:
            data, buffer = buffer[:cut], buffer[cut:]
            last = not block
            size = cut + (skipped if first else 0)
            yield TextPiece(path, lines, offset, cut, size, line, first, last)
            offset, line, first = offset + cut, line + data.count(b"\n"), False
            cut = _cut(buffer, lines, piece_bytes)
        if not block:
            return
        searched = max(len(buffer) - 1, 0)


def _cut(buffer: bytes, lines: bool, start: int) -> int:
    """Length of the first piece, at least ``start``; 0 if the buffer holds no complete piece."""
    if len(buffer) <= start:
        return 0
    if lines:
        return buffer.find(b"\n", start - 1) + 1
    found = _CUT.search(buffer, start - 1)
    return found.end() if found else 0
