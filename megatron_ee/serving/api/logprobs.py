"""Log-probabilities in responses: the tokens' texts and bytes, their offsets, and the most probable others."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_ee.data.tokenizer import Detokenizer, Tokenizer
from megatron_ee.inference.heads import LogProbs
from megatron_ee.inference.requests import Completion, Token
from megatron_ee.serving.api.prompts import Prompt
from megatron_ee.serving.api.response_bodies import ChatLogprobs, ChosenLogprob, CompletionLogprobs, TokenLogprob

LOWEST = -9999.0
"""Log-probability of a token that cannot be chosen; JSON has no infinity. OpenAI's value."""
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


@dataclass(frozen=True)
class ScoredToken:
    """A token and its log-probabilities; None for the first token of a prompt."""

    id: int
    logprob: float | None
    top: dict[int, float] = field(default_factory=dict)


def scored(tokens: Iterable[Token]) -> list[ScoredToken]:
    """Emitted tokens, which have log-probabilities."""
    return [ScoredToken(token.id, _logprobs(token).emitted, _logprobs(token).top) for token in tokens]


def scored_prompt(ids: Sequence[int], completion: Completion | None) -> list[ScoredToken]:
    """The tokens of a prompt.

    Args:
        ids: the prompt.
        completion: of the request that replayed ``ids[1:]``, or ran with them forced; None if there are none.
    """
    found: Iterable[LogProbs] = ()
    if completion is not None:
        found = completion.replay[-1].logprobs if completion.replay else map(_logprobs, completion.tokens)
    rest = zip(ids[1:], found, strict=True)
    return [ScoredToken(ids[0], None), *(ScoredToken(token_id, each.forced, each.top) for token_id, each in rest)]


def _logprobs(token: Token) -> LogProbs:
    assert token.logprobs is not None, "the request has logprobs"
    return token.logprobs


class LogprobWriter:
    """Writes the log-probabilities of one answer, token by token.

    Args:
        texts: of the tokenizer.
        tokenizer: of the model.
        prompt: of the answer.
        echo: whether the answer's text starts with the prompt, whose tokens are then written too.
        as_ids: name tokens by id.
    """

    def __init__(self, texts: TokenTexts, tokenizer: Tokenizer, prompt: Prompt, *, echo: bool, as_ids: bool) -> None:
        self._texts, self._as_ids = texts, as_ids
        self._stream = Detokenizer(tokenizer, () if echo else prompt.ids)
        self._offset = 0
        first, name = prompt.ids[0], tokenizer.name_of(prompt.ids[0])
        # A beginning-of-text token that the tokenizer has added is not part of the text.
        self._skips_next = echo and first == tokenizer.bos_id and name is not None and not prompt.text.startswith(name)

    def completion_logprobs(self, tokens: Iterable[ScoredToken]) -> CompletionLogprobs:
        """The next tokens, for ``/v1/completions``."""
        written = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in tokens:
            text = self._name(token.id)
            written.tokens.append(text)
            written.text_offset.append(self._offset)
            piece = self._stream.push(token.id)
            self._offset += 0 if self._skips_next else len(piece)
            self._skips_next = False
            if token.logprob is None:
                written.token_logprobs.append(None)
                written.top_logprobs.append(None)
                continue
            written.token_logprobs.append(_finite(token.logprob))
            top: dict[str, float] = {}
            for other, value in token.top.items():  # the largest first; tokens may share a text
                top.setdefault(self._name(other), _finite(value))
            top.setdefault(text, _finite(token.logprob))
            written.top_logprobs.append(top)
        return written

    def chat_logprobs(self, tokens: Iterable[ScoredToken]) -> ChatLogprobs:
        """The next tokens, for ``/v1/chat/completions``."""
        content = []
        for token in tokens:
            top = [self._entry(other, value) for other, value in token.top.items()]
            entry = self._entry(token.id, LOWEST if token.logprob is None else token.logprob)
            content.append(ChosenLogprob(**entry.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)

    def _entry(self, token: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token=self._name(token), logprob=_finite(logprob), bytes=self._texts.utf8(token))

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._texts.text(token)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
