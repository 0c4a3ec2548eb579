"""Writes a corpus under temporary names in the same directory, then renames the files, the index last."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ee.data.encode import Encoded
from megatron_ee.data.indexed import describes_corpus, file_of, indexed_dataset, sha256
from megatron_ee.data.texts import SUFFIX, Hashes
from megatron_ee.errors import ConfigError, DataError

# The order of the renames. A corpus without its index cannot be opened, so an incomplete one is never read. The
# description comes first: it marks an incomplete corpus as ours, so that it may be replaced.
SUFFIXES = (".json", SUFFIX, ".mask.bin", ".mask.idx", ".bin", ".idx")
_MOST_TOKENS = 2**31 - 1  # document lengths are int32 in the index


class CorpusWriter:
    """Collects encoded pieces in order. As a context manager it removes files that were not committed.

    Raises:
        ConfigError: the output exists and ``overwrite`` is False, or is not a prefix.
        DataError: the output cannot be written.
    """

    def __init__(self, prefix: Path, vocab_size: int, masked: bool, overwrite: bool) -> None:
        existing = [file_of(prefix, suffix) for suffix in SUFFIXES if file_of(prefix, suffix).exists()]
        if existing and not overwrite:
            raise ConfigError(f"{existing[-1]}: exists already; choose another --output or give --overwrite")
        if existing and not describes_corpus(file_of(prefix, ".json")):
            raise ConfigError(
                f"{existing[-1]}: exists, and {file_of(prefix, '.json')} does not say that prepare-data wrote it; "
                "--overwrite replaces only what it wrote: choose another --output"
            )
        if prefix.is_dir() or not prefix.name:
            raise ConfigError(f"{prefix}: is a directory; --output is a prefix such as {prefix / 'corpus'}")
        self._prefix = prefix
        self._temporary = prefix.with_name(f".{prefix.name}.tmp-{os.getpid()}")
        self._masked = masked
        module = indexed_dataset()
        self._dtype = module.DType.optimal_dtype(vocab_size)
        self.documents = self.tokens = self.trained = 0
        self.largest_id = 0  # of all tokens
        self._open_tokens = 0  # of the incomplete document
        self._builders: list[Any] = []
        self._texts: list[Hashes] = []
        try:
            with self._writing():
                prefix.parent.mkdir(parents=True, exist_ok=True)
                self._builders.append(module.IndexedDatasetBuilder(str(self._file(".bin")), dtype=self._dtype))
                if masked:
                    self._builders.append(module.IndexedDatasetBuilder(str(self._file(".mask.bin")), dtype=np.uint8))
        except DataError:
            self._remove()
            raise

    def add(self, encoded: Encoded, where: str) -> None:
        """Append the documents of a piece; ``where`` names its file in errors."""
        values: list[NDArray[Any] | None] = [encoded.ids.astype(self._dtype), encoded.mask]
        begin = 0
        for index, length in enumerate(encoded.lengths):
            self._open_tokens += length
            if self._open_tokens > _MOST_TOKENS:
                raise DataError(f"{where}: a document has more than {_MOST_TOKENS} tokens; split it")
            complete = encoded.ends or index + 1 < len(encoded.lengths)
            for builder, value in zip(self._builders, values, strict=False):
                assert value is not None
                with self._writing():
                    builder.data_file.write(value[begin : begin + length].tobytes())
                if complete:
                    builder.sequence_lengths.append(self._open_tokens)
                    builder.end_document()
            if complete:
                self.documents += 1
                self._open_tokens = 0
            begin += length
        self._texts.append(encoded.texts)
        self.tokens += len(encoded.ids)
        self.largest_id = max(self.largest_id, int(encoded.ids.max(initial=0)))
        self.trained += len(encoded.ids) if encoded.mask is None else int(encoded.mask.sum())

    def finish(self) -> dict[str, Any]:
        """Write the indices. Return counts and digests under the names of ``CorpusMetadata``."""
        for builder, suffix in zip(self._builders, ("", ".mask"), strict=False):
            with self._writing():
                builder.finalize(str(self._file(f"{suffix}.idx")))
        with self._writing():
            np.unique(np.concatenate(self._texts)).astype("<u8").tofile(self._file(SUFFIX))
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "sha256": sha256(self._file(".bin")),
            "mask_sha256": sha256(self._file(".mask.bin")) if self._masked else None,
        }

    def commit(self, metadata: str) -> tuple[Path, ...]:
        """Rename all files to their final names. Return their paths."""
        with self._writing():
            self._file(".json").write_text(metadata, encoding="utf-8")
            written = [suffix for suffix in SUFFIXES if self._file(suffix).exists()]
            for suffix in reversed(SUFFIXES[1:]):  # the old index first
                file_of(self._prefix, suffix).unlink(missing_ok=True)
            for suffix in written:
                os.replace(self._file(suffix), file_of(self._prefix, suffix))
        return tuple(file_of(self._prefix, suffix) for suffix in written)

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for builder in self._builders:
            with contextlib.suppress(OSError):  # a full disk was already reported
                builder.data_file.close()
        self._remove()

    def _file(self, suffix: str) -> Path:
        return file_of(self._temporary, suffix)

    def _remove(self) -> None:
        for suffix in SUFFIXES:
            with contextlib.suppress(OSError):  # the reason is already being reported
                self._file(suffix).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self._prefix}: cannot be written: {error}") from None
