"""From what a user writes to token ids, and what ends an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from megatron_ee.data.chat import render_chat
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.data.tokenizer_files import eos_token_ids
from megatron_ee.errors import ConfigError, DataError, shown
from megatron_ee.inference.requests import Request


def prompt_ids(request: Request, tokenizer: Tokenizer | None, vocab_size: int, max_positions: int) -> tuple[int, ...]:
    """A request's prompt as token ids.

    Raises:
        ConfigError: it is empty, no text, longer than the model's context, or has ids beyond the vocabulary.
    """
    if isinstance(request.prompt, str):
        if tokenizer is None:
            raise ConfigError("prompt: is text, but there is no tokenizer; give token ids")
        _check_text(request.prompt)
        prompt = tuple(tokenizer.encode_prompt(request.prompt)) if request.prompt else ()
    elif isinstance(request.prompt, bytes) or not isinstance(request.prompt, Sequence):
        raise ConfigError(f"prompt: must be text or token ids, not {shown(request.prompt)}")
    else:
        prompt = tuple(cast("Sequence[int]", request.prompt))
    if not prompt:
        raise ConfigError("prompt: is empty; give text to continue")
    if tokenizer is not None and all(type(token) is int for token in prompt):
        _check_known(tokenizer, prompt, vocab_size)
    check_ids("prompt", prompt, vocab_size)
    if len(prompt) >= max_positions:
        raise ConfigError(f"prompt: has {len(prompt)} tokens, but the model has {max_positions} positions; shorten it")
    return prompt


def _check_text(text: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell and which stands for bytes of the command line that are not
    UTF-8: tokenizers fail on it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt: is no text that can be encoded: character {error.start}: {error.reason}") from None


def _check_known(tokenizer: Tokenizer, prompt: Sequence[int], vocab_size: int) -> None:
    """Name a token of the tokenizer that the model has no embedding for; other ids are ``check_ids``'s business."""
    wrong = tokenizer.unknown_token([token for token in prompt if token < tokenizer.vocab_size], vocab_size)
    if wrong is not None:
        raise ConfigError(f"prompt: {wrong}; leave it out of the text and the chat template")


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise a ``ConfigError`` that names the field where one is no token of the model."""
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ConfigError(f"{name}: token ids must be whole numbers from 0 to {vocab_size - 1}")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation in the model's own chat template, up to where the assistant's answer begins.

    Raises:
        DataError: there is no template, or it fails on these messages.
        ConfigError: the rendered conversation is no text that can be encoded.
    """
    if not tokenizer.templates:
        raise DataError(f"{tokenizer.path}: the tokenizer has no chat template; give the prompt as text")
    try:
        text, _ = render_chat(tokenizer, messages, prompt=True)
    except Exception as error:  # a template is a program: it may fail in any way
        raise DataError(f"{tokenizer.path}: the chat template fails on these messages: {error}") from None
    _check_text(text)
    return tokenizer.encode_spans(text)[0]


def end_of_text(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end generation: any that the model's configuration, its generation configuration or its tokenizer
    names. The tokenizer's one ends a turn of the chat template where the others end a document, or the reverse.

    Raises:
        DataError: ``eos_token_id`` is not a token id or a list of them.
    """
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return frozenset((*eos_token_ids(directory), *own))
