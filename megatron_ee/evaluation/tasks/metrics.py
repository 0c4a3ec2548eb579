"""Quality of an answer: pure functions of its text and the references. The best reference counts.

Texts are compared as sequences of tokens that are the same for every model, see ``tokens``. All metrics are in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from unicodedata import normalize

import regex
from rapidfuzz.distance import LCSseq

# Scripts that put no space between words.
_SPACELESS = "".join(
    rf"\p{{scx={script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Tai_Tham")
)
_CHARACTER = rf"[[\p{{L}}]&&[{_SPACELESS}]]\p{{M}}*"
_FIRST = rf"[[\p{{L}}\p{{N}}]--[[\p{{L}}]&&[{_SPACELESS}]]]"
_IN_WORD = rf"[{_FIRST}\p{{M}}]"
_LETTERS = f"{_FIRST}{_IN_WORD}*"
_MINUS = rf"(?<!{_IN_WORD})[-\u2212](?=\p{{Nd}})"
# An apostrophe stays in its word, and a point or comma in its number.
_WORD = rf"(?:{_MINUS})?{_LETTERS}(?:(?:['\u2019]|(?<=\p{{Nd}})[.,](?=\p{{Nd}})){_LETTERS})*"
_TOKEN = regex.compile(f"{_CHARACTER}|{_WORD}", regex.V1)
_SAME = str.maketrans({"\u2212": "-", "\u2019": "'"})
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_SPACELESS_LETTER = regex.compile(_CHARACTER, regex.V1)


@lru_cache(maxsize=4096)
def tokens(text: str) -> tuple[str, ...]:
    """Words and numbers of a text; in scripts without spaces, such as Japanese or Thai, single characters.

    The text is normalised first (NFKC, case folded), so that full-width letters equal plain ones. Combining marks stay
    with their letter. What only shapes its neighbours, such as joiners and variation selectors, is left out. So are
    punctuation and symbols, except inside numbers (-3.5) and words (don't).
    """
    plain = normalize("NFKC", text.replace("\u00b4", "'")).casefold()  # NFKC makes a space and a mark of that accent
    return tuple(_TOKEN.findall(normalize("NFKC", _INVISIBLE.sub("", plain)).translate(_SAME)))


def is_spaceless(character: str) -> bool:
    """Whether a character is a letter of a script that puts no space between words."""
    return _SPACELESS_LETTER.match(character) is not None


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer has the tokens of a reference, in order, and no others."""
    return _best(answer, references, lambda mine, theirs: float(mine == theirs))


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if the tokens of a reference stand in the answer side by side."""
    return _best(answer, references, _contains)


def f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of the shares of the answer's and of the reference's tokens that both have, in any order."""
    return _best(
        answer, references, lambda mine, theirs: _harmonic((Counter(mine) & Counter(theirs)).total(), mine, theirs)
    )


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure: as ``f1``, but of the longest common subsequence."""
    return _best(answer, references, lambda mine, theirs: _harmonic(LCSseq.similarity(mine, theirs), mine, theirs))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "contains": contains,
    "exact_match": exact_match,
    "f1": f1,
    "rouge_l": rouge_l,
}
"""The metrics by name."""


def _best(answer: str, references: Sequence[str], metric: Callable[[tuple[str, ...], tuple[str, ...]], float]) -> float:
    """The best of ``metric`` over the references; 0 if a text has no tokens."""
    mine = tokens(answer)
    return max((metric(mine, theirs) for theirs in map(tokens, references) if mine and theirs), default=0.0)


def _contains(mine: tuple[str, ...], theirs: tuple[str, ...]) -> float:
    size = len(theirs)
    return float(any(mine[start : start + size] == theirs for start in range(len(mine) - size + 1)))


def _harmonic(common: int, mine: Sequence[str], theirs: Sequence[str]) -> float:
    """F1 of precision ``common / len(mine)`` and recall ``common / len(theirs)``."""
    return 2 * common / (len(mine) + len(theirs))
