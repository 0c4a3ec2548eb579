"""Corpora on disk: megatron-core's indexed datasets with an optional mask beside the tokens.

``PREFIX.bin``/``.idx`` hold the tokens, one sequence per document, each ending with the end-of-text token;
``PREFIX.mask.bin``/``.idx`` hold one uint8 per token if only some tokens are labels; ``PREFIX.json`` records how the
corpus was made. Datasets that Megatron-LM prepared have no ``.json`` and can be read too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import DataError
from megatron_ee.progress import track

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset


COUNTED = 20_000_000
"""Number of tokens that are counted for statistics."""
SCANNED = 2**24
"""Tokens read between two updates of a progress bar."""
BLOCK, BLOCKS = 64 * 1024, 256
"""Size of one sample of a file in bytes, and number of samples per file. Smaller files are read whole."""


class CorpusMetadata(Strict):
    """The content of ``PREFIX.json``.

    Attributes:
        tokenizer: path of the tokenizer, as given on the command line.
        vocab_size: its vocabulary size.
        eos_id: its end-of-text token.
        documents: number of documents.
        tokens: number of tokens, end-of-text tokens included.
        trained_tokens: number of tokens that are labels.
        sha256: of ``PREFIX.bin``.
        mask_sha256: of ``PREFIX.mask.bin``, or None without masks.
        largest_id: the largest token id in the corpus; None in older files.
        largest_token: that token, as the tokenizer spells it.
        tokenizer_sha256: digest of the tokenizer, see ``data.fingerprint``; None in older files.
    """

    tokenizer: str
    vocab_size: int
    eos_id: int
    documents: int
    tokens: int
    trained_tokens: int
    sha256: str
    mask_sha256: str | None = None
    largest_id: int | None = None
    largest_token: str | None = None
    tokenizer_sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An open corpus.

    Attributes:
        prefix: path of the corpus, without suffix.
        tokens: token ids by document.
        masks: uint8 by document, 1 if the token is a label; None if all tokens are labels.
        metadata: None for datasets made by other tools.
    """

    prefix: Path
    tokens: IndexedDataset
    masks: IndexedDataset | None
    metadata: CorpusMetadata | None

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, [documents]."""
        return np.array(self.tokens.sequence_lengths, dtype=np.int32)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def trained_share(self) -> float:
        """Share of the tokens that are labels. Without metadata it is counted, up to the first ``COUNTED`` tokens."""
        if self.masks is None:
            return 1.0
        if self.metadata is not None:
            return self.metadata.trained_tokens / self.metadata.tokens
        return float(np.memmap(file_of(self.prefix, ".mask.bin"), dtype=np.uint8, mode="r")[:COUNTED].mean())

    @cached_property
    def fingerprint(self) -> str:
        """Digest of tokens, masks and document boundaries.

        Without metadata only samples of the files are read, so it is fast for corpora of any size. The samples and the
        lengths of all documents together identify a corpus.
        """
        tokens = self.metadata.sha256 if self.metadata else sampled_sha256(file_of(self.prefix, ".bin"))
        masks = self.metadata.mask_sha256 if self.metadata else None
        if self.masks is not None and masks is None:
            masks = sampled_sha256(file_of(self.prefix, ".mask.bin"))
        lengths = hashlib.sha256(self.lengths.tobytes()).hexdigest()
        return hashlib.sha256(f"{tokens} {masks} {lengths}".encode()).hexdigest()

    def every_token(self) -> NDArray[Any]:
        """The tokens of all documents, concatenated, ``[tokens]``, memory-mapped."""
        return np.memmap(file_of(self.prefix, ".bin"), dtype=self.tokens.index.dtype, mode="r")

    def largest_id(self, check: Callable[[], None] = lambda: None) -> int:
        """Largest token id, found by reading all tokens, with a progress bar. ``check`` may raise to stop."""
        tokens, largest = self.every_token(), 0
        with track(tokens.nbytes, "B", f"reading the tokens of {self.prefix}") as bar:
            for start in range(0, len(tokens), SCANNED):
                check()
                part = tokens[start : start + SCANNED]
                largest = max(largest, int(part.max()))
                bar.advance(part.nbytes)
        return largest

    def check_vocabulary(self, model_vocab_size: int, check: Callable[[], None] = lambda: None) -> None:
        """Check that every token in the corpus is in the model's vocabulary.

        Args:
            model_vocab_size: rows of the model's embedding.
            check: called now and then if the tokens have to be read. It may raise to stop.

        Raises:
            DataError: a token is outside the vocabulary; the message names it.
        """
        metadata = self.metadata
        if metadata is not None and metadata.vocab_size <= model_vocab_size:
            return
        if metadata is not None and metadata.largest_id is not None:
            largest, token = metadata.largest_id, f"token {metadata.largest_token!r} (id {metadata.largest_id})"
        else:
            largest = self.largest_id(check)
            token = f"token id {largest}"
        if largest >= model_vocab_size:
            raise DataError(
                f"{self.prefix}: holds {token}, which is not in the model's vocabulary of {model_vocab_size} tokens; "
                "prepare the data with the model's own tokenizer"
            )


def frequent_tokens(prefix: str | Path, count: int, model_vocab_size: int) -> list[int]:
    """The ``count`` most frequent token ids of a corpus's first ``COUNTED`` tokens, ascending.

    Fewer if the corpus has fewer different tokens.

    Raises:
        DataError: the corpus cannot be used, or does not fit the model's vocabulary.
    """
    corpus = open_corpus(prefix)
    corpus.check_vocabulary(model_vocab_size)
    counts = np.bincount(corpus.every_token()[:COUNTED], minlength=model_vocab_size)
    order = np.argsort(-counts, kind="stable")[:count]
    return sorted(int(token) for token in order if counts[token] > 0)


def file_of(prefix: str | Path, suffix: str) -> Path:
    """``PREFIX`` with ``suffix`` appended (a prefix may hold dots)."""
    return Path(f"{prefix}{suffix}")


def open_corpus(prefix: str | Path) -> Corpus:
    """Open ``PREFIX.bin`` and its companion files, memory-mapped.

    Raises:
        DataError: a file is missing, damaged or empty, or mask and tokens do not have the same lengths.
    """
    prefix = Path(prefix)
    tokens = _open_dataset(prefix, prefix)
    mask_prefix = file_of(prefix, ".mask")
    masks = None
    if file_of(mask_prefix, ".bin").exists() or file_of(mask_prefix, ".idx").exists():
        masks = _open_dataset(mask_prefix, prefix)
        if masks.index.dtype != np.uint8 or not np.array_equal(masks.sequence_lengths, tokens.sequence_lengths):
            raise DataError(f"{mask_prefix}.idx: does not have the documents of {prefix}.idx; prepare the corpus again")
    metadata = _read_metadata(file_of(prefix, ".json"))
    if metadata is not None and (metadata.documents, metadata.tokens) != (
        len(tokens),
        int(tokens.sequence_lengths.sum(dtype=np.int64)),
    ):
        raise DataError(f"{prefix}.json: its counts are not those of {prefix}.idx; prepare the corpus again")
    if metadata is not None and metadata.mask_sha256 is not None and masks is None:
        raise DataError(f"{mask_prefix}.bin: not found, but {prefix}.json names it; prepare the corpus again")
    return Corpus(prefix, tokens, masks, metadata)


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_sha256(path: Path) -> str:
    """Digest of a file's size and of ``BLOCKS`` blocks spread evenly over it. A smaller file is read whole."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= BLOCK * BLOCKS:
            digest.update(file.read())
        else:
            for offset in np.linspace(0, size - BLOCK, BLOCKS).astype(np.int64):
                file.seek(int(offset))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _open_dataset(prefix: Path, corpus: Path) -> IndexedDataset:
    """An indexed dataset whose index has been checked against the size of its data."""
    for suffix in (".idx", ".bin"):
        path = file_of(prefix, suffix)
        if not path.is_file():
            raise DataError(
                f"{path}: not found; {corpus} is not a corpus; give the prefix that prepare-data --output wrote"
            )
        if path.stat().st_size == 0:
            raise DataError(f"{path}: empty; prepare the corpus again")
    _check_index(file_of(prefix, ".idx"))
    try:
        dataset = indexed_dataset().IndexedDataset(str(prefix))
    except (AssertionError, ValueError):
        raise DataError(f"{prefix}.idx: damaged; prepare the corpus again") from None
    length = int(dataset.sequence_lengths.sum(dtype=np.int64)) * np.dtype(dataset.index.dtype).itemsize
    size = file_of(prefix, ".bin").stat().st_size
    if size != length:
        raise DataError(f"{prefix}.bin: {size} bytes, but {prefix}.idx says {length}; prepare the corpus again")
    return dataset


def _check_index(path: Path) -> None:
    """Check header and size before megatron-core maps the file, which it does without a check."""
    header = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(header.size)
    if len(start) == header.size:
        magic, version, dtype, sequences, boundaries = header.unpack(start)
        # Per sequence an int32 length and an int64 offset, per boundary an int64.
        expected = header.size + 12 * sequences + 8 * boundaries
        if magic == b"MMIDIDX\x00\x00" and version == 1 and 1 <= dtype <= 8 and sequences and size == expected:
            return
    raise DataError(f"{path}: damaged, or not the index of an indexed dataset; prepare the corpus again")


def describes_corpus(path: Path) -> bool:
    """Whether a file is the description of a corpus that any version of ``prepare-data`` wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"tokenizer", "documents", "tokens", "sha256"} <= content.keys()


def _read_metadata(path: Path) -> CorpusMetadata | None:
    if not path.is_file():
        return None
    try:
        return validated(CorpusMetadata, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged: {' '.join(str(error).split())}; prepare the corpus again") from None


def indexed_dataset() -> Any:
    """Import megatron-core's module of that name. The import takes seconds, so it happens on demand."""
    from megatron_ee.platform import quiet_imports, quiet_runtime

    quiet_runtime()
    with quiet_imports():
        from megatron.core.datasets import indexed_dataset as module
    return module


def dataset_helpers() -> Any:
    """megatron-core's compiled index builders."""
    from megatron_ee.platform import quiet_imports

    with quiet_imports():
        from megatron.core.datasets import helpers
    return helpers
