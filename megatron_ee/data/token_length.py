"""How much text one token can stand for. So a text that is far too long is refused without tokenizing it.

White space, the character that stands for a space, and control characters are not counted: tokenizers may drop or merge
any number of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_SPACE = "\u2581"
_CONTROLS = [chr(value) for value in (*range(0x20), 0x7F) if not chr(value).isspace()]
# Steps before the model that drop nothing but white space. Composition (NFC) makes one character of at most four.
_NORMALIZERS = {"ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Strip"}
_COMPOSING = {"NFC", "NFKC"}
_MOST_COMPOSED = 4
_PRE_TOKENIZERS = {
    "BertPreTokenizer",
    "ByteLevel",
    "Digits",
    "Metaspace",
    "Punctuation",
    "Split",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
}
# A byte-level vocabulary without some other bytes still has a token in every counted character.
_NEEDED_BYTES = (*range(0x21, 0x7F), *range(0x80, 0xC0))


def count_characters(text: str) -> int:
    """Number of counted characters."""
    visible = "".join(text.replace(_SPACE, " ").split())
    return len(visible) - sum(map(visible.count, _CONTROLS))


def longest_token(core: tokenizers.Tokenizer) -> int | None:
    """The most counted characters of a text that one token of a ``tokenizer.json`` stands for.

    None if this is unknown, because the tokenizer may drop characters, or take any number of unknown ones for a token.
    """
    settings: dict[str, Any] = json.loads(core.to_str())
    model = settings["model"]
    normalizers = list(_steps(settings["normalizer"], "normalizers"))
    splits = list(_steps(settings["pre_tokenizer"], "pretokenizers"))
    by_bytes = any(step["type"] == "ByteLevel" for step in (*normalizers, *splits))
    if not (model["type"] == "BPE" and _has_all_characters(model, by_bytes=by_bytes)):
        return None
    if not (all(map(_normalizer_keeps, normalizers)) and all(map(_split_keeps, splits))):
        return None
    blank = str.maketrans("", "", "".join(map(_byte_symbol, b"\t\n\v\f\r ")) if by_bytes else "")
    lengths = [count_characters(token.translate(blank)) for token in model["vocab"]]
    lengths += [count_characters(token["content"]) for token in settings["added_tokens"]]
    composes = any(step["type"] in _COMPOSING for step in normalizers)
    return max(lengths) * (_MOST_COMPOSED if composes else 1)


def _steps(step: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a sequence, of one step, or of none."""
    if step is not None and step["type"] == "Sequence":
        for each in step[name]:
            yield from _steps(each, name)
    elif step is not None:
        yield step


def _has_all_characters(model: Mapping[str, Any], *, by_bytes: bool) -> bool:
    """Whether each counted character of a text is part of a token, unknown ones in a token of their own."""
    vocabulary = model["vocab"]
    if by_bytes:
        return all(_byte_symbol(value) in vocabulary for value in _NEEDED_BYTES)
    if model["byte_fallback"]:
        return all(f"<0x{value:02X}>" in vocabulary for value in range(256))
    return model["unk_token"] is not None and not model["fuse_unk"]


def _byte_symbol(value: int) -> str:
    """How a byte-level vocabulary spells a byte: as itself if it is visible in Latin-1, else from U+0100 on."""
    hidden = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
    return chr(0x100 + hidden.index(value)) if value in hidden else chr(value)


def _normalizer_keeps(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        return count_characters(step["pattern"].get("String", "x")) == 0
    return step["type"] in _NORMALIZERS


def _split_keeps(step: Mapping[str, Any]) -> bool:
    replaces_space = step.get("replacement", _SPACE) == _SPACE
    return step["type"] in _PRE_TOKENIZERS and step.get("behavior") != "Removed" and replaces_space
