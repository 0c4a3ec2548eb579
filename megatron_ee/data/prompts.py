"""Prompts for generation: the beginnings of held-out documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from megatron_ee.data.packing import DocumentRange


def held_out_prompts(ranges: Sequence[DocumentRange], count: int, length: int, longest: int) -> list[tuple[int, ...]]:
    """Token ids of the prompts, from the first documents of each range in turn.

    Where the first tokens of a document are no labels (chat), the prompt is everything before the first label, so that
    a model continues it with its own answer. Otherwise it is the first ``length`` tokens, but at most half of the
    document.

    Args:
        ranges: held-out documents.
        count: number of prompts; fewer are returned if there are too few documents.
        length: tokens per prompt where all tokens of a document are labels.
        longest: documents whose first label comes after more tokens than this are left out.
    """
    turns = itertools.zip_longest(*(_prompts(documents, length, longest) for documents in ranges))
    found = (prompt for turn in turns for prompt in turn if prompt is not None)
    return list(itertools.islice(found, count))


def _prompts(documents: DocumentRange, length: int, longest: int) -> Iterator[tuple[int, ...]]:
    for document in range(documents.start, documents.stop):
        size = int(documents.corpus.lengths[document])
        tokens, labels = documents.read(document, 0, min(size, longest + 1))
        if not labels.any():
            continue
        before = int(labels.argmax()) or min(length, size // 2)
        if before:
            yield tuple(tokens[:before].tolist())
