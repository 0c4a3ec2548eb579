"""Batches for tuning and validation: weighted blends of corpora, at a position that can be saved.

The position of a run is one number: the sequences consumed so far.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ee.config.schema import CorpusConfig, DataConfig
from megatron_ee.data.indexed import Corpus, dataset_helpers, open_corpus
from megatron_ee.data.packing import DocumentRange, JoinedDocuments, PackedDocuments, split, whole
from megatron_ee.errors import ConfigError, DataError

Sample = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


@dataclass(frozen=True)
class Batch:
    """Sequences of one microbatch, on the CPU.

    Attributes:
        tokens: int64 [batch, seq].
        labels: int64 [batch, seq], the next token of each.
        mask: bool [batch, seq], whether the label counts in the loss.
        num_tokens: number of labels that count.
        sequences: indices of these sequences in the order of the data.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    num_tokens: int
    sequences: range = range(0)


class PackedBlend:
    """An endless sequence of samples from several corpora, in proportion to their weights.

    Sequence ``i`` depends only on (corpora, weights, seed, i). ``corpora`` holds the corpora in their order, and
    ``trained_tokens`` the number of labels in what is read of each.

    Raises:
        ConfigError: a weight that is not positive, a negative seed, or a sequence length below 2.
        DataError: a corpus is shorter than one sequence.
    """

    def __init__(
        self, ranges: Sequence[DocumentRange], weights: Sequence[float], sequence_length: int, seed: int
    ) -> None:
        if not ranges or len(ranges) != len(weights):
            raise ConfigError("data.train: name at least one corpus, each with one weight")
        for documents, weight in zip(ranges, weights, strict=True):
            if not 0 < weight < float("inf"):
                raise ConfigError(f"data.train: the weight of {documents.corpus.prefix} must be positive, not {weight}")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"data.seed: must lie between 0 and {2**32 - 1}, not {seed}")
        self.sequence_length = sequence_length
        self.corpora = tuple(documents.corpus for documents in ranges)
        self.trained_tokens = tuple(documents.trained_tokens for documents in ranges)
        self._parts = [PackedDocuments(r, sequence_length, (seed, place)) for place, r in enumerate(ranges)]
        self._weights = np.array(weights, dtype=np.float64) / sum(weights)
        self._corpus_of = np.empty(0, dtype=np.int16)
        self._place_in = np.empty(0, dtype=np.int64)

    @property
    def samples_per_epoch(self) -> tuple[int, ...]:
        """Sequences in one pass over each corpus."""
        return tuple(part.samples_per_epoch for part in self._parts)

    def passes(self, sequences: int) -> tuple[float, ...]:
        """Passes over each corpus that the first ``sequences`` sequences make."""
        return tuple(
            sequences * float(weight) / part.samples_per_epoch
            for weight, part in zip(self._weights, self._parts, strict=True)
        )

    def source(self, index: int) -> tuple[int, int]:
        """Corpus of sequence ``index``, and the sequence's number within that corpus."""
        if len(self._parts) == 1:
            return 0, index
        if index >= len(self._corpus_of):
            # Built greedily from the front, so every longer table begins with the shorter one.
            size = max(1 << 14, 2 * len(self._corpus_of), index + 1)
            self._corpus_of = np.zeros(size, dtype=np.int16)
            self._place_in = np.zeros(size, dtype=np.int64)
            dataset_helpers().build_blending_indices(
                self._corpus_of, self._place_in, self._weights, len(self._parts), size, False
            )
        return int(self._corpus_of[index]), int(self._place_in[index])

    def __getitem__(self, index: int) -> Sample:
        """Tokens, labels and mask of one sequence, each [sequence_length]."""
        corpus, place = self.source(index)
        tokens, mask = self._parts[corpus][place]
        return tokens[:-1], tokens[1:], mask[1:]


class Windows(ABC):
    """Windows of one length that are scored once, batch by batch.

    Attributes:
        sequence_length: labels per window.
    """

    sequence_length: int

    @abstractmethod
    def __len__(self) -> int:
        """Number of windows."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Tokens, labels and mask of one window, each [sequence_length]."""

    def batches(self, batch_size: int, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """Windows ``rank``, ``rank + size``, ... in batches; the last may be smaller."""
        mine = range(rank, len(self), size)
        for start in range(0, len(mine), batch_size):
            yield self.batch(mine[start : start + batch_size])

    def batch(self, windows: range) -> Batch:
        """These windows in one batch."""
        return _collate(self, windows)

    def runs(
        self,
        batch_size: int,
        rank: int = 0,
        size: int = 1,
        *,
        length: int = 1,
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[list[Batch]]:
        """The same batches in groups.

        Args:
            length: batches per group, equal on every rank.
            check: called before each group, equally often on every rank, even if a rank has no batch left. It may
                communicate, and raise to end the loop on all ranks.
        """
        batches = self.batches(batch_size, rank, size)
        most = -(
            -len(range(0, len(self), size)) // batch_size
        )  # of the first rank, which has at least as many as the others
        for _ in range(0, most, length):
            check()
            run = list(itertools.islice(batches, length))
            if run:
                yield run


class ValidationWindows(Windows):
    """Corpora cut in order into windows without overlap, so that each label is scored exactly once.

    The last window of a corpus is padded with token 0, masked. With a limit each corpus gives its first windows, and
    all corpora the same number if they have enough. ``corpora`` holds the corpora in their order, ``ranges`` the
    documents.

    Args:
        ranges: documents to validate on.
        sequence_length: labels per window.
        limit: largest number of windows; 0 for all.

    Raises:
        DataError: there is no label to score.
    """

    def __init__(self, ranges: Sequence[DocumentRange], sequence_length: int, limit: int = 0) -> None:
        if sequence_length < 1 or limit < 0:
            raise ConfigError(f"validation: sequence length {sequence_length} or number of sequences {limit} too small")
        self.sequence_length = sequence_length
        self.corpora = tuple(documents.corpus for documents in ranges)
        self.ranges = tuple(ranges)
        available = [-(-(documents.num_tokens - 1) // sequence_length) for documents in ranges]
        counts = _share(available, limit) if limit else available
        self._windows = [(place, window) for place, count in enumerate(counts) for window in range(count)]
        self._streams = [JoinedDocuments(documents) for documents in ranges]
        if not self._windows:
            names = ", ".join(str(documents.corpus.prefix) for documents in ranges) or "no corpus"
            raise DataError(f"{names}: nothing to validate on; give a corpus of at least two tokens")

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._windows)

    def __getitem__(self, index: int) -> Sample:
        """Tokens, labels and mask of one window, each [sequence_length]."""
        place, window = self._windows[index]
        tokens, mask = self._streams[place].read(window * self.sequence_length, self.sequence_length + 1)
        missing = self.sequence_length + 1 - len(tokens)
        tokens, mask = np.pad(tokens, (0, missing)), np.pad(mask, (0, missing))
        return tokens[:-1], tokens[1:], mask[1:]

    @property
    def fingerprint(self) -> str:
        """Digest of the content of all windows, the key of results that are cached for them."""
        parts = [(r.corpus.fingerprint, r.start, r.stop) for r in self.ranges]
        text = repr((parts, self.sequence_length, self._windows))
        return hashlib.sha256(text.encode()).hexdigest()


class MicrobatchStream:
    """The microbatches of one data-parallel rank, step by step.

    The global batch is sequences ``consumed`` to ``consumed + global_batch_size``, for every ``data_size``. Rank 0, 1,
    ... take runs of ``micro_batch_size`` sequences in turn.

    Args:
        consumed: sequences that all ranks have taken so far. A checkpoint saves the attribute of this name.

    Raises:
        ConfigError: the global batch size is not a multiple of micro batch size times ranks.
    """

    def __init__(
        self,
        dataset: PackedBlend,
        micro_batch_size: int,
        global_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        consumed: int = 0,
    ) -> None:
        if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * data_size):
            raise ConfigError(
                f"tuning.global_batch_size: {global_batch_size} is not a multiple of tuning.micro_batch_size "
                f"{micro_batch_size} times {data_size} data-parallel ranks"
            )
        self.consumed = consumed
        self._dataset = dataset
        self._micro, self._global = micro_batch_size, global_batch_size
        self._rank, self._size = data_rank, data_size

    @property
    def num_microbatches(self) -> int:
        """Microbatches of this rank per step."""
        return self._global // (self._micro * self._size)

    def step(self) -> list[Batch]:
        """This rank's microbatches of the next step. ``consumed`` increases by the global batch size."""
        batches = []
        for number in range(self.num_microbatches):
            first = self.consumed + (number * self._size + self._rank) * self._micro
            batches.append(_collate(self._dataset, range(first, first + self._micro)))
        self.consumed += self._global
        return batches


def validation_windows(
    corpora: Sequence[Corpus | DocumentRange], sequence_length: int, limit: int = 0
) -> ValidationWindows:
    """``ValidationWindows`` over corpora or parts of them."""
    return ValidationWindows([whole(c) if isinstance(c, Corpus) else c for c in corpora], sequence_length, limit)


def open_data(
    config: DataConfig,
    model_vocab_size: int | None,
    validation_sequences: int = 0,
    check: Callable[[], None] = lambda: None,
) -> tuple[PackedBlend, ValidationWindows | None]:
    """The training blend and the validation windows, or None if none are configured.

    Args:
        model_vocab_size: rows of the model's embedding. None skips the vocabulary check, which reads all of a corpus
            without a description: only the first rank needs it.
        validation_sequences: largest number of windows; 0 for all.
        check: called now and then while a whole corpus is read. It may raise to stop.

    Raises:
        ConfigError: contradictory or impossible settings, naming the key.
        DataError: a corpus that cannot be read or does not fit the model.
    """
    if config.validation and config.validation_fraction:
        raise ConfigError("data.validation_fraction: data.validation names corpora already; give one of the two")
    if not config.train:
        raise ConfigError("data.train: name at least one corpus")
    train, weights = _open_blend(config.train, model_vocab_size, check)
    ranges, held_out = [whole(corpus) for corpus in train], []
    if config.validation:
        held_out = [whole(corpus) for corpus in _open_blend(config.validation, model_vocab_size, check)[0]]
    elif config.validation_fraction:
        pairs = [split(corpus, config.validation_fraction) for corpus in train]
        ranges, held_out = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    blend = PackedBlend(ranges, weights, config.sequence_length, config.seed)
    windows = ValidationWindows(held_out, config.sequence_length, validation_sequences) if held_out else None
    return blend, windows


def _open_blend(
    entries: Sequence[str | CorpusConfig], vocab_size: int | None, check: Callable[[], None]
) -> tuple[list[Corpus], list[float]]:
    """Corpora and weights of a configured blend."""
    settings = [entry if isinstance(entry, CorpusConfig) else CorpusConfig(entry) for entry in entries]
    corpora = [open_corpus(Path(setting.path)) for setting in settings]
    if vocab_size is not None:
        for corpus in corpora:
            corpus.check_vocabulary(vocab_size, check)
    return corpora, [setting.weight for setting in settings]


def _share(available: Sequence[int], limit: int) -> list[int]:
    """Split ``limit`` evenly. If a corpus has fewer, the others get the rest."""
    counts = [0] * len(available)
    # In ascending order of size, each takes at most an even share of the rest.
    for done, place in enumerate(sorted(range(len(available)), key=lambda place: available[place])):
        counts[place] = min(available[place], limit // (len(available) - done))
        limit -= counts[place]
    return counts


def _collate(dataset: PackedBlend | Windows, sequences: range) -> Batch:
    tokens, labels, masks = (np.stack(column) for column in zip(*(dataset[i] for i in sequences), strict=True))
    mask = torch.from_numpy(masks)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), mask, int(np.count_nonzero(masks)), sequences)
