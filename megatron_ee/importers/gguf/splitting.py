"""How byte-level BPE tokenizers split a text before they merge: ``tokenizer.ggml.pre`` names one of these ways.

The patterns are those of the released ``tokenizer.json`` files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tokenizers
from tokenizers import normalizers, pre_tokenizers

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_BEFORE_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN2 = rf"{_CONTRACTIONS}|{_BEFORE_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
TEKKEN = (
    rf"{_BEFORE_WORD}{_CAPITALS}*{_SMALL}+|{_BEFORE_WORD}{_CAPITALS}+{_SMALL}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
GPT4O = (
    rf"{_BEFORE_WORD}{_CAPITALS}*{_SMALL}+{_CONTRACTIONS}?|{_BEFORE_WORD}{_CAPITALS}+{_SMALL}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


@dataclass(frozen=True)
class Splitting:
    """One way to split.

    Attributes:
        make: the pre-tokenizer.
        whole_words: a word of the vocabulary is one token, whatever the merges make of it.
        add_bos: whether beginning-of-text is added, unless the file says otherwise.
        normalizer: of the text before it is split.
    """

    make: Callable[[], pre_tokenizers.PreTokenizer]
    whole_words: bool = False
    add_bos: bool = False
    normalizer: normalizers.Normalizer | None = None


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> pre_tokenizers.PreTokenizer:
    """GPT-2's, with every digit alone."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _pattern(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def make() -> pre_tokenizers.PreTokenizer:
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"), bytes_only]
        )

    return make


_LLAMA3 = Splitting(_pattern(LLAMA3), whole_words=True, add_bos=True)
_CL100K = Splitting(_pattern(LLAMA3))
_QWEN2 = Splitting(_pattern(QWEN2))
SPLITTINGS: dict[str, Splitting] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), Splitting(_gpt2)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), Splitting(_digits)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _CL100K),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "stablelm2"), _QWEN2),
    "qwen2": Splitting(_pattern(QWEN2), normalizer=normalizers.NFC()),
    "tekken": Splitting(_pattern(TEKKEN), whole_words=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Splitting(_pattern(GPT4O))),
}
"""By ``tokenizer.ggml.pre``."""
UNSTATED = SPLITTINGS["gpt-2"]
"""For files that name none, or ``default``."""
