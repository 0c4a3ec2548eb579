"""From the engine's tokens and completions to the bodies of answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_ee.data.tokenizer import Detokenizer, Tokenizer
from megatron_ee.inference.heads import LogProbs
from megatron_ee.inference.requests import Completion, FinishReason, Token
from megatron_ee.serving.answers import (
    ChatLogprobs,
    ChosenLogprob,
    ExitDetails,
    ExitSummary,
    PromptDetails,
    Reason,
    TextLogprobs,
    TokenLogprob,
    Usage,
)
from megatron_ee.serving.exit_log import exit_statistics
from megatron_ee.serving.rules import Decision
from megatron_ee.serving.token_texts import TokenTexts
from megatron_ee.serving.translate import Generation, Prompt

LOWEST = -9999.0
"""Log-probability of a token that cannot be chosen; JSON has no infinity. OpenAI's value."""


@dataclass(frozen=True)
class Heading:
    """What an answer starts with: its id, time (Unix seconds) and the name of the model."""

    id: str
    created: int
    model: str


def new_heading(generation: Generation, model: str) -> Heading:
    """A heading with a new id."""
    prefix = "chatcmpl" if generation.chat else "cmpl"
    return Heading(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)


def reason_of(reason: FinishReason) -> Reason:
    """OpenAI's reason for the end of an answer."""
    return "stop" if reason in ("eos", "stop") else "length"


@dataclass(frozen=True)
class Scored:
    """A token and its log-probabilities; None for the first token of a prompt."""

    id: int
    logprob: float | None
    top: dict[int, float] = field(default_factory=dict)


def scored(token: Token) -> Scored:
    """An emitted token, which has log-probabilities."""
    found = _logprobs(token)
    return Scored(token.id, found.emitted, found.top)


def scored_prompt(ids: Sequence[int], forced: Iterable[Token]) -> list[Scored]:
    """The tokens of a prompt.

    Args:
        ids: the prompt.
        forced: the tokens emitted with ``ids[1:]`` forced.
    """
    rest = ((token_id, _logprobs(token)) for token_id, token in zip(ids[1:], forced, strict=True))
    return [Scored(ids[0], None), *(Scored(each, lp.forced, lp.top) for each, lp in rest)]


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
        first = prompt.ids[0]
        name = tokenizer.name_of(first)
        # The beginning-of-text token that the tokenizer has added is not part of the text.
        self._added = first if echo and name is not None and not prompt.text.startswith(name) else None
        self._added = self._added if first == tokenizer.bos_id else None

    def text_logprobs(self, tokens: Iterable[Scored]) -> TextLogprobs:
        """The next tokens, for ``/v1/completions``."""
        written = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in tokens:
            text = self._name(token.id)
            written.tokens.append(text)
            written.text_offset.append(self._offset)
            piece = self._stream.push(token.id)
            self._offset += 0 if self._added is not None else len(piece)
            self._added = None
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

    def chat_logprobs(self, tokens: Iterable[Scored]) -> ChatLogprobs:
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


def exit_details(tokens: Sequence[Token], pieces: Sequence[str]) -> ExitDetails:
    """Where tokens left, and the text that each added."""
    return ExitDetails(
        layers=[token.layer for token in tokens],
        confidences=[round(token.confidence, 4) for token in tokens],
        pieces=list(pieces),
    )


def exit_summary(decision: Decision, completions: Sequence[Completion]) -> ExitSummary:
    """What early exit did.

    Args:
        decision: how the request ran; one of several.
        completions: all answers.
    """
    request = decision.request
    found = exit_statistics(completions, 0)
    layers = found["tokens_by_layer"]
    weighted = sum(int(layer) * count for layer, count in layers.items())
    return ExitSummary(
        mode=request.mode,
        policy=decision.policy,
        tier=decision.tier,
        task=decision.task,
        reason=decision.reason,
        calibration=request.coverage,
        tokens_by_layer=layers,
        mean_exit_layer=weighted / found["tokens"] if found["tokens"] else None,
        layers_per_token=found["layers_per_token"],
        proposed=found["proposed"],
        accepted=found["accepted"],
    )


def usage_of(generation: Generation, completions: Sequence[Completion]) -> Usage:
    """Numbers of tokens of a whole answer."""
    prompt = sum(len(each.ids) for each in generation.prompts)
    answered = sum(len(each.tokens) for each in completions)
    cached = sum(each.statistics["reused_tokens"] for each in completions)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=answered,
        total_tokens=prompt + answered,
        prompt_tokens_details=PromptDetails(cached_tokens=min(cached, prompt)),
    )
