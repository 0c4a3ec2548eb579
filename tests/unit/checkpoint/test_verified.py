"""Verified reads: what comes out, how often a byte is read and hashed for it, and what a changed byte does."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_ee.checkpoint import digest, verified
from megatron_ee.checkpoint.verified import VerifiedFile
from megatron_ee.errors import DamagedError

BLOCK = 2**14
SIZE = 5 * BLOCK // 2
Open = Callable[..., tuple[VerifiedFile, int, bytes]]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Makes a file of two and a half small blocks, its first bytes a header, and opens it."""
    monkeypatch.setattr(verified, "BLOCK", BLOCK)
    monkeypatch.setattr(digest, "PIECE", BLOCK // 4)
    monkeypatch.setattr(verified, "_kept", verified._Kept())  # it is of blocks of one size
    descriptors = []

    def make(change: int | None = None, header_end: int = 100) -> tuple[VerifiedFile, int, bytes]:
        content = os.urandom(SIZE)
        digests = [hashlib.sha256(content[start : start + BLOCK]).hexdigest() for start in range(0, SIZE, BLOCK)]
        found = bytearray(content)
        if change is not None:
            found[change] ^= 1
        path = tmp_path / f"{len(descriptors)}.safetensors"
        path.write_bytes(found)
        descriptors.append(os.open(path, os.O_RDONLY))
        return VerifiedFile(path, SIZE, header_end, digests), descriptors[-1], content

    yield make
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each read from a file."""
    counts: list[int] = []
    original = verified.read_exactly

    def counted(fd: int, out: memoryview, position: int, path: Path) -> None:
        counts.append(len(out))
        original(fd, out, position, path)

    for module in (verified, digest):
        monkeypatch.setattr(module, "read_exactly", counted)
    return counts


def read(file: VerifiedFile, fd: int, start: int, stop: int) -> bytes:
    out = bytearray(stop - start)
    file.read(fd, memoryview(out), start, "w")
    return bytes(out)


@pytest.mark.parametrize("start, stop", [(0, SIZE), (100, SIZE), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (7, 7)])
def test_gives_the_bytes(start: int, stop: int, opened: Open) -> None:
    file, fd, content = opened()
    for _ in range(2):  # unchecked, then checked
        assert read(file, fd, start, stop) == content[start:stop]


def test_one_read_of_all_reads_each_byte_once(opened: Open, reads: list[int]) -> None:
    file, fd, content = opened()
    assert read(file, fd, 100, SIZE) == content[100:] and sum(reads) == SIZE


def test_reads_in_order_read_each_byte_once(opened: Open, reads: list[int]) -> None:
    file, fd, content = opened()
    step = 1000
    parts = [read(file, fd, start, min(SIZE, start + step)) for start in range(100, SIZE, step)]
    assert b"".join(parts) == content[100:] and sum(reads) == SIZE


def test_threads_check_a_block_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    file, fd, content = opened()
    hashed: list[int] = []
    original = VerifiedFile._check

    def counted(self: VerifiedFile, fd: int, memory: memoryview, block: int, tensor: str) -> None:
        hashed.append(block)
        original(self, fd, memory, block, tensor)

    monkeypatch.setattr(VerifiedFile, "_check", counted)
    starts = range(0, SIZE, 500)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: read(file, fd, start, min(SIZE, start + 500)), starts))
    assert b"".join(parts) == content and sorted(hashed) == [0, 1, 2]


@pytest.mark.parametrize("change", [0, BLOCK - 1, BLOCK + 5, SIZE - 1])
@pytest.mark.parametrize("step", [SIZE, 1000])
def test_a_changed_byte_is_never_given_out(change: int, step: int, opened: Open) -> None:
    file, fd, content = opened(change)
    block = change // BLOCK
    for start in range(0, SIZE, step):
        stop = min(SIZE, start + step)
        # The header's block is checked whatever is read.
        if block in (0, *range(start // BLOCK, -(-stop // BLOCK))):
            for _ in range(2):  # what failed once is not taken as checked
                with pytest.raises(DamagedError, match=f"damaged between bytes {block * BLOCK} and .* in tensor 'w'"):
                    read(file, fd, start, stop)
        else:
            assert read(file, fd, start, stop) == content[start:stop]


def test_a_damaged_block_is_not_cached(opened: Open) -> None:
    """After a damaged block the thread goes on with another file's."""
    bad, bad_fd, _ = opened(BLOCK + 5)
    good, good_fd, content = opened()
    assert read(good, good_fd, BLOCK, BLOCK + 10) == content[BLOCK : BLOCK + 10]
    with pytest.raises(DamagedError):
        read(bad, bad_fd, BLOCK, BLOCK + 10)
    assert read(good, good_fd, BLOCK, BLOCK + 10) == content[BLOCK : BLOCK + 10]
    with pytest.raises(DamagedError):
        read(bad, bad_fd, BLOCK + 2, BLOCK + 10)
