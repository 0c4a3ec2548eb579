"""Streams an ``OutputDirectory`` to disk in bounded memory, and continues after an interruption.

Files are written in ``NAME.converting`` beside the output, several at a time, each through one buffer of a few MiB. The
checksums of a finished file are kept in ``.progress``. When all files are finished, one rename makes the output
visible. The same command, run again after an interruption, keeps the finished files that are unchanged.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from torch import Tensor

from megatron_ee.checkpoint.atomic import clear_leftovers, commit_directory, storage_errors, write_file, write_json
from megatron_ee.checkpoint.digest import BlockHasher, hash_range
from megatron_ee.checkpoint.failpoints import failpoint
from megatron_ee.checkpoint.manifest import BLOCK
from megatron_ee.checkpoint.outputs import OutputDirectory, OutputFile, Part, Written
from megatron_ee.checkpoint.ownership import check_new
from megatron_ee.checkpoint.safetensors_file import DTYPE_NAMES
from megatron_ee.config.untrusted import open_regular, read_json
from megatron_ee.errors import CheckpointError

WRITERS = 2
"""Files written at a time: one is hashed while the other waits for the disk."""
PROGRESS, LOCK = ".progress", ".lock"
SPARE = 64 * 2**20  # bytes for headers and small files


def write_output(
    output: OutputDirectory,
    final: Path,
    *,
    advance: Callable[[int], None] = lambda count: None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write ``output`` to the new directory ``final``: completely, or in a form that a rerun continues.

    Args:
        advance: called with the number of bytes of tensors just written, or found finished.
        report: called with lines about files that an earlier run finished.

    Raises:
        ConfigError: ``final`` exists.
        CheckpointError: another conversion writes there, the disk is too small, or something cannot be read or written.
    """
    check_new(final)
    with _work_directory(final) as work:
        _clear_others(output, work)
        _check_space(output, work)
        written = _write_files(output, work, advance, report)
        failpoint("convert.finish")
        for name, source in output.assets.items():
            with storage_errors(work / name, "write"):
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                content = source if isinstance(source, bytes) else source.read_bytes()
            write_file(work / name, content)
        for name, content in output.finish(work, written).items():
            write_file(work / name, content)
        with storage_errors(work, "write"):
            shutil.rmtree(work / PROGRESS)
        failpoint("convert.rename")
        commit_directory(work, final)
        with storage_errors(final, "write"):
            (final / LOCK).unlink()


@contextlib.contextmanager
def _work_directory(final: Path) -> Iterator[Path]:
    """The working directory, held by a lock. Finished files in it stay when the body fails."""
    work = final.with_name(f"{final.name}.converting")
    if work.is_dir() and any(work.iterdir()) and not (work / LOCK).is_file():
        raise CheckpointError(f"{work}: exists already and is not from an interrupted conversion; move it away")
    with storage_errors(work, "write"):
        (work / PROGRESS).mkdir(parents=True, exist_ok=True)
        fd = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{work}: another conversion is writing here; wait for it") from None
        except OSError:
            pass  # a file system without locks: if two run, the final rename lets only one succeed
        clear_leftovers(work)
        try:
            yield work
        except BaseException:
            if (work / PROGRESS).is_dir() and not any((work / PROGRESS).iterdir()):
                shutil.rmtree(work, ignore_errors=True)  # nothing to continue from
            raise
    finally:
        os.close(fd)


def _clear_others(output: OutputDirectory, work: Path) -> None:
    """Remove files that are not part of ``output``, left by an interrupted command with other options."""
    own = {work / file.name for file in output.files} | {_record(file, work) for file in output.files}
    with storage_errors(work, "clean up"):
        for path in sorted(work.rglob("*"), reverse=True):  # the content of a directory comes before the directory
            if path.is_dir() and not path.is_symlink():
                if path != work / PROGRESS and not any(path.iterdir()):
                    path.rmdir()
            elif path not in own and path != work / LOCK:
                path.unlink()


def _record(file: OutputFile, work: Path) -> Path:
    """Path of the record that a file is finished."""
    return work / PROGRESS / f"{hashlib.sha256(file.name.encode()).hexdigest()[:16]}.json"


def _check_space(output: OutputDirectory, work: Path) -> None:
    """Refuse an output that does not fit on the disk, before hours of writing. Files of an earlier run count as
    written."""
    with storage_errors(work, "measure the free space"):
        free = shutil.disk_usage(work).free
        there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    needed = output.nbytes + SPARE - there
    if needed > free:
        raise CheckpointError(
            f"{work.parent}: needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; "
            "free some space or choose another --output"
        )


def _write_files(
    output: OutputDirectory, work: Path, advance: Callable[[int], None], report: Callable[[str], None]
) -> dict[str, Written]:
    stop, lock = threading.Event(), threading.Lock()

    def count(nbytes: int) -> None:
        with lock:
            advance(nbytes)

    def make(file: OutputFile) -> Written:
        fingerprint = _fingerprint(file)
        record = _record(file, work)
        kept = _finished(work / file.name, record, fingerprint)
        if kept is not None:
            report(f"{file.name}: finished by an earlier run, kept")
            count(file.nbytes)
            return kept
        written = _write_file(file, work / file.name, stop, count)
        write_json(record, {"fingerprint": fingerprint, "size": written.size, "blocks": written.blocks})
        failpoint("convert.file-done")
        return written

    with ThreadPoolExecutor(WRITERS) as pool:
        # Largest first, which keeps all threads busy to the end.
        futures = {file.name: pool.submit(make, file) for file in sorted(output.files, key=lambda file: -file.nbytes)}
        try:
            wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in futures.values():
                if future.done() and not future.cancelled():
                    future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {file.name: futures[file.name].result() for file in output.files}


def _write_file(file: OutputFile, path: Path, stop: threading.Event, count: Callable[[int], None]) -> Written:
    with storage_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)

    def watch(slabs: Iterator[Tensor]) -> Iterator[Tensor]:
        for slab in slabs:
            if stop.is_set():
                raise CheckpointError(f"{path}: not finished, because another file failed")
            failpoint("convert.file")
            yield slab
            count(slab.numel() * slab.element_size())

    hasher = BlockHasher(BLOCK)
    file.write(path, file.parts, watch, hasher.update)
    return Written(hasher.total, hasher.finish())


def _fingerprint(file: OutputFile) -> str:
    """Fingerprint of a file's sources. Equal fingerprints mean that writing the file again gives the same bytes."""

    def describe(part: Part) -> list[object]:
        tensor = part.tensor
        with storage_errors(tensor.files[0] if tensor.files else Path(file.name), "read"):
            states = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in tensor.files]
        box = [list(part.offset), list(part.shape), list(tensor.shape)]
        return [part.name, DTYPE_NAMES[tensor.dtype], box, states, tensor.made]

    text = json.dumps([file.name, [describe(part) for part in file.parts]])
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(path: Path, record: Path, fingerprint: str) -> Written | None:
    """The record of a file that an earlier run finished, if the file is unchanged."""
    try:
        if not (path.is_file() and record.is_file()):
            return None
        known = read_json(record, limit=2**24)
        written = Written(int(known["size"]), [str(block) for block in known["blocks"]])
        if known["fingerprint"] != fingerprint or path.stat().st_size != written.size:
            return None
        with open_regular(path) as fd:
            for index, block in enumerate(written.blocks):
                if hash_range(fd, index * BLOCK, min((index + 1) * BLOCK, written.size), path) != block:
                    return None
    except (CheckpointError, KeyError, TypeError, ValueError, OSError):
        return None
    return written
