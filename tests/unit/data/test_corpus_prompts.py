"""Prompts from held-out documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_ee.data.indexed import open_corpus
from megatron_ee.data.packing import DocumentRange, whole
from megatron_ee.data.prompts import held_out_prompts


def test_of_plain_text_the_first_tokens(write_corpus: Callable[..., Path]) -> None:
    """At most half of a document, which continues with the other half; a document of one token gives none."""
    corpus = open_corpus(write_corpus("a", [list(range(10, 30)), [7], [40, 41, 42, 43, 44], list(range(50, 70))]))
    expected = [(10, 11, 12, 13), (40, 41), (50, 51, 52, 53)]
    assert held_out_prompts([whole(corpus)], 9, 4, 100) == expected
    assert held_out_prompts([whole(corpus)], 2, 4, 100) == expected[:2]
    assert held_out_prompts([DocumentRange(corpus, 2, 3)], 9, 4, 100) == expected[1:2]


def test_of_a_chat_everything_before_the_first_answer(write_corpus: Callable[..., Path]) -> None:
    documents = [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14], [21, 22, 23], [31, 32, 33, 34, 35]]
    masks = [[0, 0, 0, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0], [1, 0, 1, 1, 1]]
    corpus = open_corpus(write_corpus("chat", documents, masks))
    # A document without labels has no answer, and one that starts with a label is plain text.
    assert held_out_prompts([whole(corpus)], 9, 1, 100) == [(1, 2, 3), (11,), (31,)]
    assert held_out_prompts([whole(corpus)], 9, 1, 3) == [(1, 2, 3), (11,), (31,)]
    assert held_out_prompts([whole(corpus)], 9, 1, 2) == [(11,), (31,)], "the first is too long"


def test_corpora_take_turns(write_corpus: Callable[..., Path]) -> None:
    large = open_corpus(write_corpus("a", [[start, 0, 0, 0] for start in range(1, 9)]))
    small = open_corpus(write_corpus("b", [[20, 0, 0, 0], [21, 0, 0, 0]]))
    found = held_out_prompts([whole(large), whole(small)], 6, 1, 100)
    assert found == [(1,), (20,), (2,), (21,), (3,), (4,)]
