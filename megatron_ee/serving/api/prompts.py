"""Prompts: the token ids of texts and of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.data.chat import render_chat
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import ConfigError, UserError, first_line
from megatron_ee.inference.requests import Request, check_length, check_text, prompt_ids
from megatron_ee.serving.api.request_bodies import PromptMessage


@dataclass(frozen=True)
class ModelFacts:
    """What prompts need of the model.

    Attributes:
        tokenizer: of the model.
        vocab_size: of the model.
        max_positions: of a sequence.
    """

    tokenizer: Tokenizer
    vocab_size: int
    max_positions: int


@dataclass(frozen=True)
class Prompt:
    """One prompt: its token ids, and its text as the client gave it (decoded, if it gave ids)."""

    ids: tuple[int, ...]
    text: str


def completion_prompt(given: str | Sequence[int], facts: ModelFacts) -> Prompt:
    """The prompt of a text or of token ids.

    Raises:
        ConfigError: an id is not in the vocabulary, or the prompt is empty or too long.
    """
    content = given if isinstance(given, str) else tuple(given)
    ids = prompt_ids(Request(prompt=content), facts.tokenizer, facts.vocab_size, facts.max_positions)
    return Prompt(ids, given if isinstance(given, str) else facts.tokenizer.decode(ids))


def conversation_prompt(messages: Sequence[PromptMessage], facts: ModelFacts) -> Prompt:
    """The prompt of a conversation, in the model's chat template.

    Raises:
        ConfigError: the model has no template, it fails on these messages, or the prompt is too long.
    """
    plain = [_plain(message) for message in messages]
    if not facts.tokenizer.templates:
        raise ConfigError("messages: the model has no chat template; use /v1/completions")
    try:
        text, _ = render_chat(facts.tokenizer, plain, prompt=True)
    except Exception as error:  # a template is a program and may raise any exception
        raise ConfigError(f"messages: the chat template fails on them: {first_line(error)}") from None
    try:
        check_text(text)
        check_length(facts.tokenizer, text, facts.max_positions)
        ids = tuple(facts.tokenizer.encode_spans(text)[0])
        prompt_ids(Request(prompt=ids), facts.tokenizer, facts.vocab_size, facts.max_positions)
    except UserError as error:
        name, colon, rest = str(error).partition(":")
        raise ConfigError(f"messages:{rest}" if colon and name == "prompt" else str(error)) from None
    return Prompt(ids, text)


def _plain(message: PromptMessage) -> dict[str, str]:
    """A message as chat templates read it. Templates know ``system``, not OpenAI's newer ``developer``."""
    content = message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
    plain = {"role": "system" if message.role == "developer" else message.role, "content": content}
    return plain if message.name is None else {**plain, "name": message.name}
