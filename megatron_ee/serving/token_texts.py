"""The texts and bytes of single tokens, for log-probabilities."""

from __future__ import annotations

import functools
import re

from megatron_ee.data.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_HIDDEN = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
_BYTE_LEVEL = {chr(value): value for value in range(256) if value not in _HIDDEN}
_BYTE_LEVEL |= {chr(0x100 + index): value for index, value in enumerate(_HIDDEN)}
"""How byte-level vocabularies spell bytes, as GPT-2's does."""


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens, as they are inside a text.

    Args:
        tokenizer: it is asked once per token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers drop the space before a text, so tokens are decoded after a line end.
        self._before = tokenizer.encode("\n")
        self._skip = len(tokenizer.decode(self._before))
        self._found = functools.lru_cache(maxsize=2**17)(self._find)

    def text(self, token: int) -> str:
        """The token's text. Bytes that are no whole character are spelt ``bytes:\\xe6\\xbc``, as OpenAI does."""
        text, found = self._found(token)
        if found is not None and _UNFINISHED in text:
            return "bytes:" + "".join(f"\\x{value:02x}" for value in found)
        return text

    def utf8(self, token: int) -> list[int] | None:
        """The token's UTF-8 bytes; None if they are not known."""
        found = self._found(token)[1]
        return None if found is None else list(found)

    def _find(self, token: int) -> tuple[str, bytes | None]:
        text = self._tokenizer.decode([*self._before, token])[self._skip :]
        if _UNFINISHED not in text:
            return text, text.encode(errors="replace")
        name = self._tokenizer.name_of(token) or ""
        if (byte := _BYTE.fullmatch(name)) is not None:
            return text, bytes([int(byte[1], 16)])
        if all(char in _BYTE_LEVEL for char in name):
            return text, bytes(_BYTE_LEVEL[char] for char in name)
        return text, None
