"""Tinted answers: tokens by layer, and marks where another answer differs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.evaluation.tinted import TINTED_STYLE, differences, marked_spaces, tinted_answer, tints


@pytest.mark.parametrize(
    ("mine", "other", "expected"),
    [
        ("abc", "abc", ("", "")),
        ("abxd", "abyd", ("2", "2")),
        ("abcd", "abxcd", ("2", "2")),  # the first place that differs is marked, though c comes later
        ("ab", "abcd", ("", "23")),
        ("abcd", "ab", ("23", "")),
        ("xbcd", "ybcd", ("0", "0")),
        ("abcdef", "abxxcdef", ("2", "23")),
        ("abc", "", ("012", "")),
        ("aXbXc", "aYbYc", ("13", "13")),
    ],
)
def test_differences(mine: str, other: str, expected: tuple[str, str]) -> None:
    found = differences([ord(char) for char in mine], [ord(char) for char in other])
    assert tuple("".join(map(str, sorted(each))) for each in found) == expected


def test_frequent_tokens_of_long_answers_are_aligned() -> None:
    answer = [token % 20 for token in range(300)]
    assert differences(answer[:1] + [20] + answer[1:], answer) == ({1}, {1})


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_differences_begin_at_the_first_place_that_differs(mine: list[int], other: list[int]) -> None:
    found, theirs = differences(mine, other)
    if mine == other:
        assert not found and not theirs
        return
    pairs = enumerate(zip(mine, other, strict=False))
    first = next((index for index, (one, two) in pairs if one != two), min(len(mine), len(other)))
    assert min(found | theirs) == first
    assert all(first in marks for marks, ids in ((found, mine), (theirs, other)) if first < len(ids))
    swapped = differences(other, mine)
    assert min(swapped[0] | swapped[1]) == first


def test_layers_get_colours_and_the_deepest_none() -> None:
    assert tints([8, 16, 32]) == {8: "green", 16: "cyan", 32: "deepest"}
    assert tints([32]) == {32: "deepest"} and tints([]) == {}
    for name in ("green", "deepest", "different", "departure", "unseen", "line"):
        assert f".{name}{{" in TINTED_STYLE or f".{name}," in TINTED_STYLE or f".{name}::" in TINTED_STYLE


def test_tokens_are_tinted_linked_and_marked() -> None:
    found = tinted_answer(
        ["a", "<b>", ""],
        ["green", "", "deepest"],
        titles=["one", '"two"', "three"],
        different={1},
        departure=1,
        unseen=["", "", "<|end|>"],
        link="t",
    )
    assert found == (
        '<a href="#t-0" class="green token" title="one">a</a>'
        '<a href="#t-1" class="different departure token" title="&quot;two&quot;">&lt;b&gt;</a>'
        '<a href="#t-2" class="deepest unseen token" title="three">&lt;|end|&gt;</a>'
    )
    assert tinted_answer(["\n", "\n a"], ["cyan", "cyan"]) == (
        '<span class="cyan line">\n</span><span class="cyan">\n a</span>'
    )
    assert tinted_answer(["a", ""], ["", "cyan"]) == '<span>a</span><span class="cyan"></span>'
    for options in ({"classes": ["green"]}, {"classes": ["", ""], "titles": ["one"]}):
        with pytest.raises(ValueError):
            tinted_answer(["a", "b"], **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" a b ", "␣a b␣"), ("\n", "↵"), ("  ", "␣␣"), ("", ""), (" \n x\t", "␣↵ x⇥"), ("漢", "漢")],
)
def test_spaces_of_a_token_by_itself_are_visible(text: str, expected: str) -> None:
    assert marked_spaces(text) == expected
