"""Atomic writes of files and directories, and one writer per output.

A directory is written under ``NAME.tmp-<random>`` beside its final name, every file and the directory itself are
fsynced, and one rename makes it visible. Nothing is ever overwritten. Leftovers of a killed process have names that
only this module uses (``*.tmp-*``, ``*.ready-*``, ``.trash-*``). The next holder of the output's ``writer_lock``
removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.failpoints import failpoint
from megatron_ee.errors import CheckpointError, storage_errors

LEFTOVER = re.compile(r"(?s).+\.(tmp|ready)-[0-9a-f]{8}|\.trash-.+-[0-9a-f]{8}")
_READY = re.compile(r"(?s).+\.ready-[0-9a-f]{8}")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
LOCK_NAME = ".writer.lock"


def _token() -> str:
    return secrets.token_hex(4)


def fsync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable. Does nothing on file systems that cannot sync a directory."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def _fsync_tree(directory: Path) -> None:
    """fsync every file below ``directory``, and each directory after its content."""
    for parent, _, files in os.walk(directory, topdown=False):
        for name in files:
            fd = os.open(os.path.join(parent, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_directory(Path(parent))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """Yield a descriptor of a temporary file beside ``path``; afterwards fsync it and rename it to ``path``.

    An existing file is replaced. On any exception the temporary file is removed and ``path`` is unchanged.

    Raises:
        CheckpointError: the file cannot be written (disk full, read-only, no such directory).
    """
    temporary = path.with_name(f"{path.name}.tmp-{_token()}")
    with storage_errors(path, "write"):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def write_all(fd: int, data: memoryview) -> None:
    """Write all of ``data`` (a flat memoryview of bytes). One ``write`` may write only a part of it."""
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])


def write_file(path: Path, content: bytes) -> None:
    """Write a small file through ``new_file``.

    Raises:
        CheckpointError: as ``new_file``.
    """
    with new_file(path) as fd:
        write_all(fd, memoryview(content))


def write_json(path: Path, data: Any) -> None:
    """Write strict, indented JSON through ``new_file``.

    Raises:
        CheckpointError: as ``new_file``.
        ValueError: NaN or infinity, which JSON cannot represent.
    """
    write_file(path, json.dumps(data, indent=2, allow_nan=False).encode() + b"\n")


def begin_directory(final: Path) -> Path:
    """Create and return ``NAME.tmp-<random>`` beside ``final``, making parents as needed.

    Raises:
        CheckpointError: ``final`` exists and is not an empty directory, or nothing can be created there.
    """
    with storage_errors(final, "create"):
        if not final.parent.is_dir():
            final.parent.mkdir(parents=True, exist_ok=True)
            fsync_directory(final.parent.parent)
        if os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
            raise CheckpointError(f"{final}: exists already; nothing is overwritten, move it away")
        temporary = final.with_name(f"{final.name}.tmp-{_token()}")
        temporary.mkdir()
    return temporary


def commit_directory(temporary: Path, final: Path) -> None:
    """fsync all of ``temporary``, then rename it to ``final`` (absent or an empty directory) in one step.

    Raises:
        CheckpointError: ``final`` was created in the meantime, or the file system refuses.
    """
    with storage_errors(final, "save"):
        _fsync_tree(temporary)
        try:
            os.rename(temporary, final)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise CheckpointError(f"{final}: exists already; nothing is overwritten, move it away") from None
            raise
        fsync_directory(final.parent)


@contextlib.contextmanager
def new_directory(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory, and rename it to ``final`` if the body ends without an exception.

    On any exception the temporary directory is removed and ``final`` is unchanged.

    Raises:
        CheckpointError: ``final`` exists and is not an empty directory, or it cannot be written (disk full, read-only).
    """
    final = Path(final)
    temporary = begin_directory(final)
    try:
        with storage_errors(temporary, "write"):
            yield temporary
        commit_directory(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def replace_directory(final: str | os.PathLike[str]) -> Iterator[Path]:
    """As ``new_directory``, but an existing ``final`` is replaced.

    The finished directory is first renamed ``NAME.ready-<random>``, then the old one goes to ``.trash-*``, then the new
    one takes its name. Between the last two renames ``final`` is absent, but the complete new content exists under its
    ``.ready-`` name: readers find it with ``current_directory``, and ``writer_lock`` finishes the renames of a process
    that was killed there.

    Raises:
        CheckpointError: ``final`` is not a directory, or it cannot be written (disk full, read-only).
    """
    final = Path(final)
    if os.path.lexists(final) and not final.is_dir():
        raise CheckpointError(f"{final}: is not a directory; move it away")
    ready = final.with_name(f"{final.name}.ready-{_token()}")
    with new_directory(ready) as temporary:
        yield temporary
    with storage_errors(final, "replace"):
        _install(ready, final)


def _install(ready: Path, final: Path) -> None:
    """Replace ``final`` by the complete directory ``ready``."""
    trash = final.with_name(f".trash-{final.name}-{_token()}")
    failpoint("replace.ready")
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, trash)
    failpoint("replace.between")
    os.rename(ready, final)
    fsync_directory(final.parent)
    shutil.rmtree(trash, ignore_errors=True)


def current_directory(final: str | os.PathLike[str]) -> Path:
    """Current path of the content of a directory that is written with ``replace_directory``.

    This is ``final``, or its finished successor if a writer was stopped between the two renames. If neither exists,
    ``final`` is returned, and the caller reports it as missing. Changes nothing on disk.
    """
    final = Path(final)
    for _ in range(2):  # a writer may do the last rename between our two checks
        if final.is_dir():
            return final
        for ready in _ready_directories(final.parent):
            if ready.name.rpartition(".ready-")[0] == final.name:
                return ready
    return final


def _ready_directories(parent: Path) -> list[Path]:
    """Finished replacements (``*.ready-*``) in ``parent``, newest first."""
    try:
        paths = [path for path in parent.iterdir() if _READY.fullmatch(path.name)]
        return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    except OSError:
        return []


def _discard(directory: Path) -> None:
    """Rename to ``.trash-*``, so that no half-deleted directory has the original name, then delete."""
    trash = directory.with_name(f".trash-{directory.name}-{_token()}")
    with storage_errors(directory, "delete"):
        os.rename(directory, trash)
    failpoint("prune.renamed")
    shutil.rmtree(trash, ignore_errors=True)


def numbered_directories(parent: str | os.PathLike[str], prefix: str = "step-") -> list[tuple[int, Path]]:
    """``(N, path)`` of every directory ``<prefix>N`` in ``parent``, ascending; empty if ``parent`` does not exist."""
    parent = Path(parent)
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,18})")
    if not parent.is_dir():
        return []
    with storage_errors(parent, "list"):
        matches = [(pattern.fullmatch(path.name), path) for path in parent.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def prune(parent: str | os.PathLike[str], keep: int, prefix: str = "step-") -> list[Path]:
    """Delete all but the ``keep`` (at least 1) highest-numbered ``<prefix>N`` of ``parent``. Return the deleted ones.

    Raises:
        CheckpointError: a directory cannot be renamed.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    gone = [path for _, path in numbered_directories(parent, prefix)[:-keep]]
    for path in gone:
        _discard(path)
    return gone


def mark_damaged(directory: str | os.PathLike[str]) -> Path:
    """Rename ``NAME`` to ``NAME.damaged-<random>``, so that a rerun can use ``NAME``. Return the new path.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    directory = Path(directory)
    damaged = directory.with_name(f"{directory.name}.damaged-{_token()}")
    with storage_errors(directory, "rename"):
        os.rename(directory, damaged)
        fsync_directory(directory.parent)
    return damaged


@contextlib.contextmanager
def writer_lock(
    output: str | os.PathLike[str], report: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> Iterator[None]:
    """Lock ``output`` (created if necessary) for one writer, and remove leftovers of a killed writer.

    The lock ends with the process; the lock file itself stays. On a file system without locks, ``report`` is called
    and nothing is locked.

    Raises:
        CheckpointError: another run holds the lock, or ``output`` cannot be written.
    """
    output = Path(output)
    with storage_errors(output, "write"):
        output.mkdir(parents=True, exist_ok=True)
        fd = os.open(output / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise CheckpointError(
                f"{output}: another run (process {holder}) is writing here; wait for it or choose another output"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise CheckpointError(f"{output}: cannot lock: {error.strerror}") from error
            report(f"{output}: this file system has no locks; make sure that only one run writes here")
        clear_leftovers(output)
        yield
    finally:
        os.close(fd)


def clear_leftovers(output: Path) -> None:
    """Finish or remove leftovers of killed writers in ``output`` and its direct subdirectories.

    Only the holder of the lock may call this, because a live writer's temporary directory looks the same.
    """
    for parent in (output, *(path for path in output.iterdir() if path.is_dir() and not path.is_symlink())):
        if parent != output and LEFTOVER.fullmatch(parent.name):
            continue
        with storage_errors(parent, "clean up"):
            for ready in reversed(_ready_directories(parent)):  # the newest is installed last
                _install(ready, ready.with_name(ready.name.rpartition(".ready-")[0]))
            for path in list(parent.iterdir()):
                if not LEFTOVER.fullmatch(path.name):
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
