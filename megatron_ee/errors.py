"""Errors that a user can act on. The command line prints each as one line, without a traceback."""

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

    Commands print it to stderr and end with ``exit_status``. Messages contain text from files, so they go through
    ``printable``.

    Attributes:
        common: every rank of the run raised it, so only the first rank prints it.
    """

    exit_status = 1
    common = False

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(UserError):
    """A configuration key or an option is unknown, has the wrong type or contradicts another; or it names an input that
    does not exist, or an output that must not be written to."""

    exit_status = 2


def common_error(message: str) -> ConfigError:
    """A ``ConfigError`` that every rank raises, for example about a file that all of them read."""
    error = ConfigError(message)
    error.common = True
    return error


class CheckpointError(UserError):
    """A checkpoint file or directory cannot be read, written or trusted."""


class DamagedError(CheckpointError):
    """A file's bytes are wrong: truncated, malformed, or with another checksum."""


class DataError(UserError):
    """A corpus, text file or tokenizer cannot be used."""


class Interrupted(UserError):
    """A signal asked the run to save and end; the message names the signal."""


def printable(text: str) -> str:
    """``text`` as one line that is safe on a terminal. The middle of a very long text is left out.

    Characters that move the cursor, change colours, reorder or hide text (control characters, bidirectional marks, lone
    surrogates) are shown as escapes. Line ends become spaces.
    """
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE * 2 // 3]} ... {text[-MAX_MESSAGE // 4 :]}"
    text = text.replace("\n", " ")
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def first_line(error: BaseException) -> str:
    """The first line of another library's error, shortened; the error's type if it has no text."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.strip()[:300]


def shown(value: object) -> str:
    """``repr`` of a value from a file, shortened, since it may be megabytes long or deeply nested."""
    return _SHORT.repr(value)


@contextlib.contextmanager
def storage_errors(path: str | os.PathLike[str], action: str) -> Iterator[None]:
    """Turn an ``OSError`` of the body into one line: the path, the failed action and the reason.

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
