"""The text of a probe, cut into windows: some to fit exits on, and others at its end to measure them on.

Only the first rank reads it. The others receive the windows that are run.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ee.checkpoint.saved_model import SavedModel
from megatron_ee.data.checks import check_tokenizer
from megatron_ee.data.indexed import open_corpus
from megatron_ee.data.loader import Sample, ValidationWindows, Windows, validation_windows
from megatron_ee.data.prepare import prepare_corpus
from megatron_ee.data.read import is_chat
from megatron_ee.errors import DataError
from megatron_ee.parallel.groups import Groups

WINDOW, WINDOWS = 512, 8
"""Tokens of a window at most, and windows at least: a short text has shorter ones."""
LOOKED_AT = 256
"""Windows whose masks are read to estimate the number of unmasked tokens."""


class HeldWindows(Windows):
    """Windows in memory.

    Attributes:
        counts: ``[windows]``, unmasked tokens of each.
    """

    def __init__(self, tokens: NDArray[np.int64], mask: NDArray[np.bool_]) -> None:
        """``tokens``: ``[windows, length + 1]``; ``mask`` of the labels: ``[windows, length]``."""
        self._tokens, self._mask = tokens, mask
        self.sequence_length = mask.shape[1]
        self.counts = mask.sum(axis=1)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._mask)

    def __getitem__(self, index: int) -> Sample:
        """Tokens, labels and mask of one window, each ``[length]``."""
        return self._tokens[index, :-1], self._tokens[index, 1:], self._mask[index]

    def starts(self) -> NDArray[np.bool_]:
        """Of all unmasked tokens, in order: whether the token does not follow the one before it in its window."""
        follows = np.zeros_like(self._mask)
        follows[:, 1:] = self._mask[:, :-1]
        found: NDArray[np.bool_] = ~follows[self._mask]
        return found


class ProbeText:
    """All windows of a text. Every rank has the object, and every rank calls its methods.

    Attributes:
        count: number of windows.
        per_window: unmasked tokens of a window, in the mean, estimated.
        available: unmasked tokens, estimated.
        first: a window, to time.
    """

    def __init__(self, groups: Groups, windows: ValidationWindows | None, data: Path) -> None:
        """``windows``: on the first rank; ``data``: their source, for messages."""
        self._groups, self._windows, self._data = groups, windows, data
        self.count, self.per_window = groups.from_first(self._look)
        self.available = int(self.per_window * self.count)
        self.first = self._take([0])

    def parts(self, fitted: int, held_out: int) -> tuple[HeldWindows, HeldWindows]:
        """Windows with about so many tokens: to fit on, spread over all but the held-out ones, and the held-out ones.

        Raises:
            DataError: all tokens of one part are masked.
        """
        held = max(1, round(held_out / self.per_window))
        fit = min(self.count - held, max(2, round(fitted / self.per_window)))
        places = np.linspace(0, self.count - held - 1, fit).astype(int).tolist()
        on, others = self._take(places), self._take(range(self.count - held, self.count))
        if np.count_nonzero(on.counts) < 2 or not others.counts.any():  # one window to fit on, and one to choose on
            where = "at the end of the text" if not others.counts.any() else "but at its end"
            error = DataError(f"--data: (nearly) all tokens {where} are masked; give other text")
            error.common = True
            raise error
        return on, others

    def _look(self) -> tuple[int, float]:
        assert self._windows is not None, "the first rank has them"
        count = len(self._windows)
        places = np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int)
        counts = [int(self._windows[place][2].sum()) for place in places.tolist()]
        if not any(counts):
            raise DataError(f"--data: all tokens of {self._data} are masked; give other text")
        return count, sum(counts) / len(counts)

    def _take(self, places: Sequence[int]) -> HeldWindows:
        return HeldWindows(*self._groups.from_first(lambda: self._read(places)))

    def _read(self, places: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        assert self._windows is not None, "the first rank has them"
        windows = [self._windows[place] for place in places]
        tokens, labels, masks = (np.stack(column) for column in zip(*windows, strict=True))
        return np.concatenate([tokens, labels[:, -1:]], axis=1), masks


@contextlib.contextmanager
def open_text(data: Path, model: SavedModel, groups: Groups) -> Iterator[ProbeText]:
    """The text at a corpus's prefix, or in a text or JSON lines file, tokenised for ``model``. Every rank calls this.

    A file whose first line has ``messages`` is chat data.

    Raises:
        DataError: the text cannot be used, or is too short.
    """
    with contextlib.ExitStack() as opened:
        found: list[ValidationWindows] = []
        if groups.is_main:
            directory = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="megatron-ee-probe-")))
        groups.together(lambda: found.append(_windows(data, model, directory)) if groups.is_main else None)
        yield ProbeText(groups, found[0] if found else None, data)


def _windows(data: Path, model: SavedModel, directory: Path) -> ValidationWindows:
    prefix = data
    if data.is_file():
        prefix = directory / "corpus"
        prepare_corpus([data], model.path, prefix, chat=is_chat(data))
    corpus = open_corpus(prefix)
    corpus.check_vocabulary(model.architecture.vocab_size)
    for line in check_tokenizer([("--data", corpus)], model.path):
        print(line, file=sys.stderr, flush=True)
    total = int(corpus.lengths.sum())
    length = min(WINDOW, model.architecture.max_positions, total // WINDOWS)
    if length < 16:
        raise DataError(f"--data: {data} has {total:,} tokens; give at least {16 * WINDOWS}")
    return validation_windows([corpus], length)
