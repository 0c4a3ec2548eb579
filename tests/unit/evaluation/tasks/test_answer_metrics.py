"""Quality of an answer against references, in scripts with and without spaces."""

from __future__ import annotations

import pytest
import regex

from megatron_ee.evaluation.tasks.metrics import METRICS, contains, exact_match, f1, is_spaceless, rouge_l, tokens

JAPANESE = "東京タワーは、333メートルの高さです。"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat's 2nd hat.", ["the", "cat's", "2nd", "hat"]),
        ("It\u2019s", ["it's"]),
        ("rock 'n' roll", ["rock", "n", "roll"]),
        ("-3.5 or \u22123.5, not 3,500", ["-3.5", "or", "-3.5", "not", "3,500"]),
        ("1-2", ["1", "2"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("ＡＢＣ１２", ["abc12"]),
        ("東京2024年", ["東", "京", "2024", "年"]),
        ("ラーメン、がｶﾞ", ["ラ", "ー", "メ", "ン", "が", "ガ"]),
        ("か\u3099", ["が"]),  # composed
        ("น้ำดี", ["น\u0e49\u0e4d", "า", "ด\u0e35"]),  # tone and vowel marks stay with their consonant
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # spacing marks do not end a word
        ("e\u0301te\u0301", ["été"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("ශ්\u200dරී ලංකා", ["ශ්රී", "ලංකා"]),  # a joiner is inside the word
        ("می\u200cخواهم", ["میخواهم"]),
        ("co\u00adoperate", ["cooperate"]),
        ("don\u00b4t", ["don't"]),
        ("\u0301 a \u200d\u0301", ["a"]),
        ("\u3164", []),  # a filler, which is a letter
        ("...!? 😀", []),
        ("", []),
    ],
)
def test_tokens(text: str, expected: list[str]) -> None:
    assert list(tokens(text)) == expected


@pytest.mark.parametrize("text", ["Yes", JAPANESE, "ภาษาไทย", "हिन्दी", "3"])
def test_signs_of_emoji_are_no_tokens(text: str) -> None:
    for sign in ("☺️", "✔️", "❤️", "👩\u200d👩\u200d👧", "🏴\U000e0067\U000e0062\U000e007f"):
        assert tokens(f"{text} {sign}") == tokens(text) and tokens(sign) == ()


@pytest.mark.slow
def test_every_token_has_a_letter_or_a_number() -> None:
    every = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    for text in every:
        for token in (*tokens(text), *tokens(f" {text}")):
            assert regex.search(r"[\p{L}\p{N}]", token), (text, token)


@pytest.mark.parametrize("text", [JAPANESE, "ภาษาไทย", "Été à Łódź", "中文，标点。", "हिन्दी"])
def test_identical_answers_score_1(text: str) -> None:
    assert {name: metric(text, [text]) for name, metric in METRICS.items()} == dict.fromkeys(METRICS, 1.0)


def test_known_values() -> None:
    answer, reference = "the cat sat on the mat", ["the dog sat on a mat"]
    assert f1(answer, reference) == pytest.approx(2 * 4 / 12)  # the, sat, on, mat
    assert rouge_l(answer, reference) == pytest.approx(2 * 4 / 12)
    assert f1("mat the on sat", ["sat on the mat"]) == 1.0
    assert rouge_l("mat the on sat", ["sat on the mat"]) == pytest.approx(2 * 1 / 8)
    assert f1("the the the", ["the"]) == pytest.approx(2 * 1 / 4)  # each token counts once
    assert rouge_l("東京は日本の首都", ["日本の首都は東京"]) == pytest.approx(2 * 5 / 16)  # 日本の首都


def test_containment_needs_whole_tokens_side_by_side() -> None:
    assert contains("The capital is Cape Town.", ["cape town"]) == 1.0
    assert contains("Concatenate it", ["cat"]) == 0.0
    assert contains("the town of cape", ["cape town"]) == 0.0
    assert contains("The answer is 126", ["26"]) == 0.0
    assert contains("首都は東京です", ["東京"]) == 1.0
    assert contains("Paris", ["Paris, France"]) == 0.0


def test_the_best_reference_counts() -> None:
    references = ["the Constitution", "U.S. Constitution"]
    assert exact_match("THE CONSTITUTION!", references) == 1.0
    assert f1("u.s. constitution", references) == 1.0
    assert exact_match("Constitution", references) == 0.0
    assert rouge_l("Constitution", references) == pytest.approx(2 / 3)


def test_an_answer_without_tokens_scores_0() -> None:
    for metric in METRICS.values():
        assert metric("", ["a"]) == metric("...", ["a"]) == metric("a", []) == 0.0


def test_scripts_without_spaces() -> None:
    assert [is_spaceless(each) for each in "東かカーไ"] == [True] * 5
    assert not any(is_spaceless(each) for each in "aЖ한1、 ")
