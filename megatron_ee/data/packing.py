"""Documents of one corpus, packed into full sequences in an order that depends only on seed and position."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ee.data.indexed import Corpus
from megatron_ee.errors import ConfigError, DataError

GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples, without their whole part, are spread evenly over 0 to 1, however many there are."""
_KEPT_EPOCHS = 2  # a global batch may reach from one epoch into the next


@dataclass(frozen=True)
class DocumentRange:
    """Documents ``start`` to ``stop`` (exclusive) of a corpus. They are adjacent on disk."""

    corpus: Corpus
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the range."""
        return int(self.corpus.lengths[self.start : self.stop].sum(dtype=np.int64))

    @property
    def trained_tokens(self) -> int:
        """Labels in the range, estimated from the whole corpus."""
        return round(self.num_tokens * self.corpus.trained_share)

    def read(self, document: int, offset: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens of one document of the corpus, and whether each is a label; both [length]."""
        if length == 0:  # datasets made by other tools may hold empty documents
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)
        tokens = self.corpus.tokens.get(document, offset, length)
        if self.corpus.masks is None:
            return tokens.astype(np.int64), np.ones(len(tokens), dtype=bool)
        return tokens.astype(np.int64), self.corpus.masks.get(document, offset, length).astype(bool)


def whole(corpus: Corpus) -> DocumentRange:
    """All documents of a corpus."""
    return DocumentRange(corpus, 0, corpus.num_documents)


def split(corpus: Corpus, validation_fraction: float) -> tuple[DocumentRange, DocumentRange]:
    """Training documents, and the held-out documents at the end: ``validation_fraction`` of all, at least one.

    Raises:
        ConfigError: the fraction is not between 0 and 1.
        DataError: too few documents for both.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction: must lie between 0 and 1, not {validation_fraction}")
    held_out = max(1, round(validation_fraction * corpus.num_documents))
    if held_out >= corpus.num_documents:
        raise DataError(
            f"{corpus.prefix}: data.validation_fraction {validation_fraction} of {corpus.num_documents} documents "
            "leaves none to train on; prepare the text as more documents or give data.validation a corpus of its own"
        )
    cut = corpus.num_documents - held_out
    return DocumentRange(corpus, 0, cut), DocumentRange(corpus, cut, corpus.num_documents)


class JoinedDocuments:
    """Documents of a range, joined into one stream of tokens.

    Args:
        documents: the range.
        order: numbers of its documents, int32; by default as on disk.
    """

    def __init__(self, documents: DocumentRange, order: NDArray[np.int32] | None = None) -> None:
        self._documents = documents
        self._order = np.arange(documents.start, documents.stop, dtype=np.int32) if order is None else order
        self._ends = np.cumsum(documents.corpus.lengths[self._order], dtype=np.int64)

    def read(self, begin: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens from ``begin`` on, and whether each is a label; both [length], or less at the end of the stream."""
        parts, end = [], min(begin + length, int(self._ends[-1]))
        place = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            document, stop = int(self._order[place]), min(end, int(self._ends[place]))
            offset = begin - int(self._ends[place]) + int(self._documents.corpus.lengths[document])
            parts.append(self._documents.read(document, offset, stop - begin))
            begin, place = stop, place + 1
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


class PackedDocuments:
    """Sequences of one range of documents, epoch after epoch without end.

    Each epoch joins the documents in a new order into one stream and cuts that into ``samples_per_epoch`` sequences of
    ``sequence_length`` labels, which are then shuffled. Adjacent sequences share one token: the last label of one is
    the first token of the next. The rest of an epoch's stream, less than one sequence, is dropped; these are different
    tokens in each epoch. Epochs after the first begin to cut later in the stream, by less than one sequence, and go on
    at its beginning where it ends. So even a single document is cut at other places. Sequence ``i`` depends only on
    (documents, seed, i), so any position can be read directly.
    """

    def __init__(self, documents: DocumentRange, sequence_length: int, seed: tuple[int, ...]) -> None:
        if sequence_length < 2:
            raise ConfigError(f"data.sequence_length: must be at least 2, not {sequence_length}")
        self._documents = documents
        self._sequence_length = sequence_length
        self._seed = seed
        self._tokens = documents.num_tokens
        self.samples_per_epoch = (self._tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{documents.corpus.prefix}: holds {self._tokens} tokens to train on, less than one sequence of "
                f"{sequence_length + 1}; add text or lower data.sequence_length"
            )
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens and label mask of sequence ``index``, both [sequence_length + 1]."""
        number, place = divmod(index, self.samples_per_epoch)
        epoch, length = self._epoch(number), self._sequence_length
        begin = (epoch.offset + int(epoch.order[place]) * length) % self._tokens
        tokens, mask = epoch.stream.read(begin, length + 1)
        if missing := length + 1 - len(tokens):
            more = epoch.stream.read(0, missing)
            tokens, mask = np.concatenate((tokens, more[0])), np.concatenate((mask, more[1]))
        return tokens, mask

    def _epoch(self, number: int) -> _Epoch:
        if number in self._epochs:
            self._epochs.move_to_end(number)
            return self._epochs[number]
        # RandomState rather than default_rng: its stream is frozen across numpy versions, so old runs can be resumed.
        random = np.random.RandomState(np.array([*self._seed, number], dtype=np.uint32))
        documents = np.arange(self._documents.start, self._documents.stop, dtype=np.int32)
        random.shuffle(documents)
        order = np.arange(self.samples_per_epoch, dtype=np.int64)
        random.shuffle(order)
        offset = int(number * GOLDEN % 1 * self._sequence_length)
        self._epochs[number] = _Epoch(JoinedDocuments(self._documents, documents), order, offset)
        while len(self._epochs) > _KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return self._epochs[number]


@dataclass(frozen=True)
class _Epoch:
    """One epoch's order.

    Attributes:
        stream: the documents, joined in their order.
        order: int64 [samples], the sequences in the order in which they are read.
        offset: token of the stream at which sequence 0 begins.
    """

    stream: JoinedDocuments
    order: NDArray[np.int64]
    offset: int
