"""Plain work on files: what conversions and loads are measured against. This module imports no torch."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_ee.errors import UserError, storage_errors

BLOCK = 16 * 2**20  # bytes that a core hashes before it takes the next ones
PIECE = 2**20  # bytes read at a time, small enough to stay in the core's cache


def files_of(directory: Path) -> list[Path]:
    """Every file below ``directory``, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def copy_directory(source: Path, target: Path) -> None:
    """``cp -r``, and wait until the copy is on disk, as a conversion does.

    Raises:
        UserError: it failed.
    """
    result = subprocess.run(["cp", "-r", str(source), str(target)], capture_output=True, text=True)
    if result.returncode != 0:
        raise UserError(result.stderr.strip())
    with storage_errors(target, "write"):
        for path in (*files_of(target), target):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def hash_directory(directory: Path) -> list[str]:
    """SHA-256 (hex) of every ``BLOCK`` of every file, in order, on all cores, whatever the sizes of the files."""
    places = [(path, start) for path in files_of(directory) for start in range(0, path.stat().st_size, BLOCK)]
    queue, digests = iter(enumerate(places)), [""] * len(places)

    def work() -> None:
        buffer = memoryview(bytearray(PIECE))
        for number, (path, start) in queue:
            digest = hashlib.sha256()
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                for _ in range(BLOCK // PIECE):
                    count = file.readinto(buffer) or 0
                    digest.update(buffer[:count])
            digests[number] = digest.hexdigest()

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(work) for _ in range(len(os.sched_getaffinity(0)))]:
            done.result()
    return digests


def drop_cache(directory: Path) -> float:
    """Have the page cache forget the files below ``directory``, as far as it will; the share that stayed there."""
    os.sync()  # what is not on disk yet stays, and writing it later would disturb what is measured
    for path in files_of(directory):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return resident_share(directory)


def resident_share(directory: Path) -> float:
    """Share of the bytes below ``directory`` that are in the page cache (whole pages)."""
    library = ctypes.CDLL(None, use_errno=True)
    pages = resident = 0
    for path in files_of(directory):
        size = path.stat().st_size
        if size == 0:
            continue
        states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        # A private mapping, which Python hands out the address of; nothing is ever written to it.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            start = ctypes.c_char.from_buffer(mapped)
            status = library.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), states)
            del start  # the mapping cannot be closed while it is pointed to
        if status != 0:
            raise UserError(f"{path}: cannot see what is in the page cache: {os.strerror(ctypes.get_errno())}")
        pages += len(states)
        resident += bytes(states).translate(_LOWEST_BIT).count(1)
    return resident / pages if pages else 1.0


_LOWEST_BIT = bytes(value & 1 for value in range(256))  # the others say nothing yet


def free_bytes(directory: Path) -> int:
    """Bytes that can be written to the disk of ``directory``."""
    with storage_errors(directory, "measure the free space"):
        return shutil.disk_usage(directory).free


def available_memory() -> int:
    """Bytes of memory that programs and the page cache could take without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
