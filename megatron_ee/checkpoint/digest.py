"""SHA-256 of files, tensors and whole backbones. The hash of a backbone is the same in all formats.

Bytes stream through a small buffer. Reading and hashing release the GIL, so threads hash several tensors or blocks in
parallel.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_ee.checkpoint.atomic import storage_errors, write_file
from megatron_ee.checkpoint.safetensors_file import DTYPE_NAMES, PIECE, scratch_buffer, tensor_bytes
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.untrusted import open_regular, read_exactly, read_json
from megatron_ee.errors import CheckpointError
from megatron_ee.progress import track

FileState = tuple[str, int, int]  # resolved path, size in bytes, time of last change in ns


def is_sha256(value: object) -> bool:
    """Whether ``value`` is a SHA-256 as this package writes it: 64 hex digits."""
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def hash_workers() -> int:
    """Number of hashing threads: the CPUs that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


def hash_range(fd: int, start: int, stop: int, path: Path, memory: memoryview | None = None) -> str:
    """SHA-256 (hex) of the bytes ``start`` to ``stop`` of an open file, in pieces that fit into the cache.

    Args:
        memory: filled with these bytes, if given.

    Raises:
        CheckpointError: the file ends before ``stop``.
    """
    digest = hashlib.sha256()
    scratch = tensor_bytes(scratch_buffer())
    for position in range(start, stop, PIECE):
        room = scratch if memory is None else memory[position - start :]
        piece = room[: min(PIECE, stop - position)]
        read_exactly(fd, piece, position, path)
        digest.update(piece)
    return digest.hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    with open_regular(Path(path)) as fd:
        return hash_range(fd, 0, os.fstat(fd).st_size, Path(path))


class BlockHasher:
    """SHA-256 of each ``size`` bytes of a stream.

    Attributes:
        total: bytes so far.
    """

    def __init__(self, size: int) -> None:
        self.total = 0
        self._size, self._digests, self._current = size, list[str](), hashlib.sha256()

    def update(self, data: memoryview) -> None:
        """Add the next bytes of the stream."""
        while len(data) > 0:
            part = data[: self._size - self.total % self._size]
            self._current.update(part)
            self.total += len(part)
            data = data[len(part) :]
            if self.total % self._size == 0:
                self._end_block()

    def finish(self) -> list[str]:
        """End the stream and return the hex digests of all blocks; the last block may be shorter."""
        if self.total % self._size:
            self._end_block()
        return self._digests

    def _end_block(self) -> None:
        self._digests.append(self._current.hexdigest())
        self._current = hashlib.sha256()


def combine_digests(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], str]]) -> str:
    """SHA-256 (hex) over the lines ``name dtype shape digest`` in the order of the names.

    Args:
        tensors: per tensor its Hugging Face name, dtype, global shape, and the digest of its bytes.
    """
    lines = (
        f"{name} {DTYPE_NAMES[dtype]} {'x'.join(map(str, shape)) or 'scalar'} {digest}\n"
        for name, dtype, shape, digest in sorted(tensors, key=lambda tensor: tensor[0])
    )
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def backbone_digest(
    tensors: Mapping[str, StoredTensor], *, fresh: bool = False, advance: Callable[[int], None] | None = None
) -> str:
    """The backbone's hash: ``combine_digests`` over its tensors under their Hugging Face names.

    It does not depend on the format and the files of the tensors. It is cached in ``cache_directory()``, by the path,
    size and time of the files and the tensors read from them. If the cache cannot be used, the hash is computed.

    Args:
        tensors: every weight of the backbone by Hugging Face name.
        fresh: read all bytes again, without the cache.
        advance: called with the number of bytes just hashed, in this thread.

    Raises:
        CheckpointError: a file cannot be read, or changes while it is read.
    """
    before = _file_states(tensors)
    key = _cache_key(tensors, before)
    cached = None if fresh else _cached(key)
    if cached is not None:
        return cached
    names = sorted(tensors, key=lambda name: -tensors[name].nbytes)  # largest first, which keeps all threads busy
    digests = {}
    with ThreadPoolExecutor(hash_workers()) as pool:
        for name, digest in zip(names, pool.map(lambda name: tensors[name].sha256(), names), strict=True):
            digests[name] = digest
            if advance is not None:
                advance(tensors[name].nbytes)
    if _file_states(tensors) != before:
        raise CheckpointError(f"{before[0][0]}: this file or one beside it changed while it was read; run again")
    result = combine_digests((name, tensors[name].dtype, tensors[name].shape, digests[name]) for name in tensors)
    _store(key, result, before)
    return result


def hash_backbone(
    tensors: Mapping[str, StoredTensor], *, check: Callable[[], None] = lambda: None, enabled: bool = True
) -> str:
    """``backbone_digest`` with its progress on stderr.

    Args:
        tensors: as for ``backbone_digest``.
        check: called after each tensor; it may raise to end the work.
        enabled: whether the progress is shown.

    Raises:
        CheckpointError: as ``backbone_digest``.
    """
    with track(sum(each.nbytes for each in tensors.values()), "B", "hashing the backbone", enabled=enabled) as bar:

        def advance(count: int) -> None:
            check()
            bar.advance(count)

        return backbone_digest(tensors, advance=advance)


def cache_directory() -> Path:
    """``$MEGATRON_EE_CACHE``, else ``megatron_ee`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("MEGATRON_EE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "megatron_ee"


def _file_states(tensors: Mapping[str, StoredTensor]) -> list[FileState]:
    states = []
    for path in sorted({path for tensor in tensors.values() for path in tensor.files}):
        with storage_errors(path, "read"):
            status = os.stat(path)
        states.append((os.path.realpath(path), status.st_size, status.st_mtime_ns))
    return states


def _cache_key(tensors: Mapping[str, StoredTensor], states: list[FileState]) -> str:
    layout = [
        [name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), sorted(map(os.path.realpath, tensor.files)), tensor.made]
        for name, tensor in sorted(tensors.items())
    ]
    return hashlib.sha256(json.dumps([2, states, layout]).encode("utf-8")).hexdigest()


def _cache_file(key: str) -> Path:
    return cache_directory() / "backbone-digests" / f"{key}.json"


def _cached(key: str) -> str | None:
    with contextlib.suppress(CheckpointError):
        content = read_json(_cache_file(key), limit=2**20)
        if isinstance(content, dict) and content.get("key") == key:
            digest = content.get("digest")
            if is_sha256(digest):
                return str(digest)
    return None


def _store(key: str, digest: str, states: list[FileState]) -> None:
    file = _cache_file(key)
    with contextlib.suppress(CheckpointError, OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"key": key, "digest": digest, "files": [path for path, _, _ in states]}
        write_file(file, json.dumps(content, indent=1).encode("utf-8"))
