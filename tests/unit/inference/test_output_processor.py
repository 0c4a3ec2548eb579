"""Text while it is generated: the same as all at once, and nothing of a stop string, however tokens cut them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_ee.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ee.errors import ConfigError
from megatron_ee.inference.output_processor import TextStream

MANY = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
PROMPT = "a prompt with END in it\n"


@pytest.fixture(scope="module", params=["hf_dir", "sp_model", "fallback_dir"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One of each kind of decoder."""
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def letters(hf_dir: Path) -> tuple[Tokenizer, dict[str, int]]:
    """A tokenizer, and the token of each ASCII character alone."""
    tokenizer = load_tokenizer(hf_dir)
    return tokenizer, {tokenizer.decode([token]): token for token in range(tokenizer.vocab_size)}


def cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """Of the whole text: what comes out, and the stop string. Written without the stream's own means."""
    for end in range(len(text) + 1):
        for each in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(each):
                return text[: end - len(each)], each
    return text, None


def stream_all(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int], stop: Sequence[str]
) -> tuple[list[str], str | None]:
    """Every piece, that of ``finish`` last, and the stop string."""
    stream = TextStream(tokenizer, prompt, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped is not None:
            break
    return [*pieces, stream.finish()], stream.stopped


def spell(letters: tuple[Tokenizer, dict[str, int]], text: str) -> list[int]:
    return [letters[1][char] for char in text]


# -- without stop strings


@pytest.mark.parametrize("text", ["the fox", "naïve 漢字 😀 🜚\n    the", "👩🏽\u200d🚀" * 9, "", "  ", "the\ufffd fox"])
def test_joined_output_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    prompt, ids = tokenizer.encode(PROMPT), tokenizer.encode_continuation(text)
    pieces, stopped = stream_all(tokenizer, prompt, ids, [])
    assert "".join(pieces) == text and stopped is None
    assert tokenizer.decode([*prompt, *ids]) == PROMPT + text


def test_each_token_gives_the_text_it_adds(letters: tuple[Tokenizer, dict[str, int]]) -> None:
    assert stream_all(letters[0], [], spell(letters, "a b"), [])[0] == ["a", " ", "b", ""]


def test_an_incomplete_character_is_held_back_until_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the🜚")
    stream = TextStream(tokenizer, [], [])
    out = "".join(stream.push(token) for token in ids[:-1])
    assert out == "the"
    rest = stream.finish()
    assert rest and set(rest) == {"\ufffd"}
    assert out + rest == tokenizer.decode(ids[:-1])
    assert stream.finish() == ""


# -- stop strings


@pytest.mark.parametrize(
    "text, stop, pieces, stopped",
    [
        ("abcdef", ["cd"], ["a", "b", "", ""], "cd"),
        ("abcxef", ["cd"], ["a", "b", "", "cx", "e", "f"], None),
        ("aab", ["ab"], ["", "a", ""], "ab"),  # of "aa" the second may begin it
        ("ababac", ["abac"], ["", "", "", "ab", "", ""], "abac"),  # until the fourth, the first may begin it
        ("abcd", ["abcd", "bc"], ["", "", "a"], "bc"),  # complete first, though it begins later
        ("abc", ["bc", "abc", "c"], ["", "", ""], "abc"),  # complete at once: the longest
        ("abc", ["ab", "abc"], ["", ""], "ab"),
        ("xyab", ["yz", "ya"], ["x", "", ""], "ya"),
        ("a\n\nb", ["\n\n"], ["a", "", ""], "\n\n"),
        ("ab", ["abc"], ["", ""], None),
        ("a", ["a"], [""], "a"),
    ],
)
def test_stop_strings(
    letters: tuple[Tokenizer, dict[str, int]], text: str, stop: list[str], pieces: list[str], stopped: str | None
) -> None:
    out, found = stream_all(letters[0], [], spell(letters, text), stop)
    expected, also = cut(text, stop)
    assert (found, "".join(out)) == (stopped, expected) and also == stopped
    assert out[:-1] == pieces


def test_one_token_with_more_than_the_stop_string(hf_dir: Path) -> None:
    tokenizer = load_tokenizer(hf_dir)
    token = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).strip() == "jumps")
    stream = TextStream(tokenizer, [], ["um"])
    assert stream.push(token) == tokenizer.decode([token]).split("um")[0]
    assert stream.stopped == "um"
    # The one that ends first, though it begins later.
    stream = TextStream(tokenizer, [], ["jumps", "um"])
    assert stream.push(token) == tokenizer.decode([token]).split("um")[0] and stream.stopped == "um"


def test_nothing_comes_after_a_stop_string(letters: tuple[Tokenizer, dict[str, int]]) -> None:
    tokenizer, ids = letters
    stream = TextStream(tokenizer, [], ["."])
    assert [stream.push(ids[char]) for char in "a.b"] == ["a", "", ""]
    assert stream.finish() == "" and stream.stopped == "."


def test_stop_strings_of_the_prompt_do_not_count(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(PROMPT + "EN")
    ids = tokenizer.encode_continuation("D the END fox")
    out, stopped = stream_all(tokenizer, prompt, ids, ["END"])
    assert "".join(out) == "D the " and stopped == "END"


def test_stop_strings_of_characters_that_are_spread_over_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the 🜚🜛 fox")
    out, stopped = stream_all(tokenizer, [], ids, ["🜛"])
    assert "".join(out) == "the 🜚" and stopped == "🜛"


def test_a_stop_string_in_what_was_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the🜚")[:-1]
    out, stopped = stream_all(tokenizer, [], ids, ["e\ufffd"])
    assert "".join(out) == "th" and stopped == "e\ufffd"


@MANY
@given(
    text=st.text("ab.", max_size=60),
    stop=st.lists(st.text("ab.", min_size=1, max_size=6), max_size=4),
    data=st.data(),
)
def test_any_cut_equals_the_whole(tokenizer: Tokenizer, text: str, stop: list[str], data: st.DataObject) -> None:
    """Few characters, so that stop strings begin, overlap and repeat all the time; tokens of one and more of them."""
    prompt = tokenizer.encode(PROMPT)
    ids: list[int] = []
    rest = text
    while rest:
        length = data.draw(st.integers(1, min(4, len(rest))))
        ids += tokenizer.encode_continuation(rest[:length])
        rest = rest[length:]
    whole = tokenizer.decode([*prompt, *ids])[len(PROMPT) :]
    out, stopped = stream_all(tokenizer, prompt, ids, stop)
    assert ("".join(out), stopped) == cut(whole, stop)


@MANY
@given(
    text=st.text(st.sampled_from("the fox\n é漢🜚😀"), max_size=80),
    stop=st.lists(st.text(st.sampled_from("the fox\n é漢🜚😀"), min_size=1, max_size=3), max_size=3),
)
@example(text="漢🜚" * 40, stop=["🜚漢 "])
def test_streamed_text_is_a_prefix_of_the_output(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    prompt, ids = tokenizer.encode(PROMPT), tokenizer.encode_continuation(text)
    expected, stop_string = cut(text, stop)
    stream = TextStream(tokenizer, prompt, stop)
    out = ""
    longest = max(map(len, stop), default=1)
    for count, token in enumerate(ids, 1):
        out += stream.push(token)
        assert expected.startswith(out)
        if stream.stopped is not None:
            break
        # No more is held back than may begin a stop string.
        sure = tokenizer.decode([*prompt, *ids[:count]])[len(PROMPT) :].rstrip("\ufffd")
        assert len(out) >= len(sure) - (longest - 1)
    out += stream.finish()
    assert (out, stream.stopped) == (expected, stop_string)


def test_refused(hf_dir: Path) -> None:
    tokenizer = load_tokenizer(hf_dir)
    with pytest.raises(ConfigError, match=r"^stop: must be a list of strings, not 'END'"):
        TextStream(tokenizer, [], "END")
    with pytest.raises(ConfigError, match=r"^stop: must be a list of strings"):
        TextStream(tokenizer, [], ["a", 5])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"^stop: holds an empty string"):
        TextStream(tokenizer, [], ["a", ""])
