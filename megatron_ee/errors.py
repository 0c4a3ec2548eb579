"""Errors that a user can act on: one clear line each, no traceback at the command line."""

from __future__ import annotations

import contextlib
import errno
import os
import reprlib
from collections.abc import Iterator

MAX_MESSAGE = 2000  # characters
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 200, 80, 40


class UserError(ValueError):
    """Bad input. The message is one line that names the key, file or value and what to do.

    Commands print it to stderr and end with ``exit_status``. Much of it comes from files and their names, so it goes
    through ``printable``.

    Attributes:
        common: every rank of the run raised it, so the first one speaks for all.
    """

    exit_status = 1
    common = False

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(UserError):
    """A configuration key is unknown, has the wrong type, or contradicts another."""

    exit_status = 2


class CheckpointError(UserError):
    """A checkpoint file or directory cannot be read, written or trusted."""


class DamagedError(CheckpointError):
    """The bytes of a file are not what they must be: truncated, malformed, or another checksum."""


class DataError(UserError):
    """A corpus, text file or tokenizer cannot be used."""


class Interrupted(UserError):
    """A signal asked the run to save and end; the message names the signal."""


def printable(text: str) -> str:
    """``text`` as one line that a terminal just shows, its middle left out where it is very long.

    Whatever moves the cursor, changes colours, reorders or hides text (control characters, bidirectional marks, lone
    surrogates) is spelt out as an escape; line ends become spaces.
    """
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE * 2 // 3]} ... {text[-MAX_MESSAGE // 4 :]}"
    text = text.replace("\n", " ")
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def first_line(error: BaseException) -> str:
    """What an error that is not ours says first, shortened; its kind where it says nothing."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.strip()[:300]


def shown(value: object) -> str:
    """``repr`` of a value that came from a file, shortened: it may be megabytes long or deeply nested."""
    return _SHORT.repr(value)


@contextlib.contextmanager
def storage_errors(path: str | os.PathLike[str], action: str) -> Iterator[None]:
    """Turn an ``OSError`` of the body into one line: the path, what could not be done, and why.

    Raises:
        CheckpointError: in place of any ``OSError`` of the file system.
    """
    try:
        yield
    except ConnectionError:  # a pipe or socket, not storage
        raise
    except OSError as error:
        hint = "; free some space or choose another place" if error.errno in _NO_SPACE else ""
        where = os.fspath(error.filename if isinstance(error.filename, (str, os.PathLike)) else path)
        raise CheckpointError(f"{where}: cannot {action}: {error.strerror or error}{hint}") from error
