"""Groups of prompts by the script that they are written in, and by their length."""

from __future__ import annotations

import functools

import regex

SCRIPTS = (
    *("Latin", "Han", "Hiragana", "Katakana", "Hangul", "Cyrillic", "Arabic", "Hebrew", "Greek", "Devanagari"),
    *("Bengali", "Tamil", "Telugu", "Gujarati", "Gurmukhi", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao"),
    *("Khmer", "Myanmar", "Georgian", "Armenian", "Ethiopic", "Tibetan"),
)
"""Unicode scripts that are told apart; all others are ``other script``."""
NO_LETTERS, OTHER_SCRIPT = "no letters", "other script"
SHORTEST = 32
"""Tokens of the longest prompt in the first group of lengths. Each further group goes to twice the length."""


def script(text: str) -> str:
    """The script that most letters of ``text`` belong to, such as ``Latin``.

    Hiragana, katakana and the Han characters beside them are ``Japanese``. Without kana, Han characters are ``Han``.
    """
    letters = len(_letters().findall(text))
    counts = {name: len(_of(name).findall(text)) for name in SCRIPTS}
    kana = counts.pop("Hiragana") + counts.pop("Katakana")
    if kana:
        counts["Japanese"] = kana + counts.pop("Han")
    counts[OTHER_SCRIPT] = letters - sum(counts.values())
    return max(counts, key=lambda name: counts[name]) if letters else NO_LETTERS


def length_bucket(tokens: int) -> str:
    """The group of a prompt of so many tokens: ``1-32``, ``33-64``, ``65-128`` and so on, each twice as long."""
    least, most = 1, SHORTEST
    while tokens > most:
        least, most = most + 1, 2 * most
    return f"{least}-{most}"


@functools.cache
def _of(name: str) -> regex.Pattern:
    """A letter of a script. Marks that both kana and others use, such as the long vowel mark, belong to no script."""
    return regex.compile(rf"[\p{{Script={name}}}&&\p{{Letter}}]", regex.V1)


@functools.cache
def _letters() -> regex.Pattern:
    """A letter of any script but those that several scripts share."""
    return regex.compile(r"[\p{Letter}--\p{Script=Common}--\p{Script=Inherited}]", regex.V1)
