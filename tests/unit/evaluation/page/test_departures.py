"""Where an early answer departs from full mode's: at the beginning of a word, never inside a character."""

from __future__ import annotations

import pytest

from megatron_ee.evaluation.page.examples_section import AFTER, BEFORE, mark_departure


@pytest.mark.parametrize(
    ("full", "early", "before", "words"),
    [
        ("The sky is blue.", "The sky is grey.", "The sky is ", ("blue", "grey")),
        ("It is Paris.", "It is Parma.", "It is ", ("Paris", "Parma")),
        ("Par", "Paris", "", ("Par", "Paris")),
        ("a b", "a b c", "a b", ("", "c")),
        ("", "yes", "", ("", "yes")),
        ("首都はパリです", "首都はパリだ", "首都はパリ", ("で", "だ")),
        ("e\u0301a", "e\u0300a", "", ("e\u0301a", "e\u0300a")),
        ("👍🏽 yes", "👍🏿 yes", "", ("👍🏽", "👍🏿")),
        ("same", "same", "same", ("", "")),
        ("a" + " " * 50 + "b", "a" + "\n" * 50 + "c", "a", ("b", "c")),
        ("a b", "a  \n", "a", ("b", "")),
        ("x" * 100, "x" * 99 + "y", "x" * 99, ("x", "y")),
    ],
)
def test_the_first_word_that_differs_is_marked(full: str, early: str, before: str, words: tuple[str, str]) -> None:
    marked = mark_departure(full, early)
    assert [each.before.rstrip() for each in marked] == [before.rstrip()] * 2
    assert tuple(each.at for each in marked) == words
    for text, each in zip((full, early), marked, strict=True):
        assert each.before + each.at + each.after == text


def test_long_texts_are_cut_around_the_place() -> None:
    full, early = ("word " * 2000 + end + " more" * 2000 for end in ("left", "right"))
    for each in mark_departure(full, early):
        assert len(each.before) == BEFORE + 1 and len(each.after) == AFTER + 1 and each.at in ("left", "right")
