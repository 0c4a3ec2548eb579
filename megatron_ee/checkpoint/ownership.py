"""Ownership of outputs: a command writes only to a new or empty directory, or to one that it wrote before.

A directory has a small marker file with the command's name. A single file contains the package's name, as the generator
of a page or in the metadata of a plot.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_ee.checkpoint.atomic import LEFTOVER, LOCK_NAME, storage_errors, write_json
from megatron_ee.errors import ConfigError

MARKER = ".megatron-ee.json"
MADE_BY = "megatron-ee"
"""Text in every single file that this package writes."""
_SHOWN = 3  # names of foreign files in an error


def check_new(path: Path, option: str = "--output") -> None:
    """Refuse an output that must be new.

    Raises:
        ConfigError: ``path`` exists and is not an empty directory.
    """
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"{option}: {path} exists already; nothing is overwritten, choose another")


def check_output(directory: Path, command: str, option: str = "--output") -> None:
    """Refuse a directory that ``command`` must not write to. Changes nothing on disk.

    It may be new or empty, or have the command's marker. Subdirectories with a marker of any command, locks, and
    leftovers of a killed writer are ignored.

    Args:
        directory: the output.
        command: name of the command.
        option: the option that names the directory.

    Raises:
        ConfigError: the directory has another marker or other files.
    """
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise ConfigError(f"{option}: {directory} is not a directory; choose a new or an empty one")
    with storage_errors(directory, "read"):
        made_by = _made_by(directory)
        foreign = sorted(path.name for path in directory.iterdir() if not _is_ours(path))
    if made_by == command or (made_by is None and not foreign):
        return
    if made_by is not None:
        raise ConfigError(f"{option}: {directory} was made by {made_by}, not by {command}; choose another directory")
    held = ", ".join(foreign[:_SHOWN]) + (f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else "")
    raise ConfigError(
        f"{option}: {directory} holds {held}, which {command} did not write; choose a new or an empty directory"
    )


def claim_output(directory: Path, command: str, option: str = "--output") -> None:
    """Create ``directory`` if necessary, and add the command's marker.

    Raises:
        ConfigError: as ``check_output``.
        CheckpointError: it cannot be created.
    """
    check_output(directory, command, option)
    with storage_errors(directory, "create"):
        directory.mkdir(parents=True, exist_ok=True)
    if _made_by(directory) is None:
        write_json(directory / MARKER, {"made_by": command})


def check_file(path: Path, option: str) -> None:
    """Refuse an existing file that this package did not write. Changes nothing on disk.

    Raises:
        ConfigError: the file exists; the message names the option.
    """
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a directory; name a file")
    if os.path.lexists(path) and MADE_BY.encode() not in _content(path):
        raise ConfigError(f"{option}: {path} exists, and megatron-ee did not write it; choose another name")


def _content(path: Path) -> bytes:
    with storage_errors(path, "read"):
        return path.read_bytes() if path.is_file() else b""


def _made_by(directory: Path) -> str | None:
    """The command in the marker; None without a marker. An output of a version without markers is recognised by its
    files."""
    try:
        made_by = json.loads((directory / MARKER).read_text(encoding="utf-8"))["made_by"]
    except FileNotFoundError:
        return "tune" if (directory / LOCK_NAME).is_file() and (directory / "status.json").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return "somebody else"
    return made_by if isinstance(made_by, str) else "somebody else"


def _is_ours(path: Path) -> bool:
    return path.name in (MARKER, LOCK_NAME) or bool(LEFTOVER.fullmatch(path.name)) or (path / MARKER).is_file()
