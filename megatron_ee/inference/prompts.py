"""From what a user writes to token ids, and what ends an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from megatron_ee.config.untrusted import read_json
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import CheckpointError, ConfigError, DataError, shown
from megatron_ee.inference.requests import Request


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids with the special tokens that the tokenizer puts around a text: for many a beginning-of-text token."""
    if tokenizer.hf is not None:
        return list(tokenizer.hf.encode(prompt))
    # A bare SentencePiece model is of the Llama kind, whose texts begin with that token.
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*start, *tokenizer.encode(prompt)]


def prompt_ids(request: Request, tokenizer: Tokenizer | None, vocab_size: int, max_positions: int) -> tuple[int, ...]:
    """A request's prompt as token ids.

    Raises:
        ConfigError: it is empty, no text, longer than the model's context, or has ids beyond the vocabulary.
    """
    if isinstance(request.prompt, str):
        if tokenizer is None:
            raise ConfigError("prompt: is text, but there is no tokenizer; give token ids")
        try:
            request.prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"prompt: is no text that can be encoded: character {error.start}: {error.reason}"
            ) from None
        prompt = tuple(encode_prompt(tokenizer, request.prompt)) if request.prompt else ()
    elif isinstance(request.prompt, bytes) or not isinstance(request.prompt, Sequence):
        raise ConfigError(f"prompt: must be text or token ids, not {shown(request.prompt)}")
    else:
        prompt = tuple(cast("Sequence[int]", request.prompt))
    if not prompt:
        raise ConfigError("prompt: is empty; give text to continue")
    check_ids("prompt", prompt, vocab_size)
    if len(prompt) >= max_positions:
        raise ConfigError(f"prompt: has {len(prompt)} tokens, but the model has {max_positions} positions; shorten it")
    return prompt


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise a ``ConfigError`` that names the field where one is no token of the model."""
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ConfigError(f"{name}: token ids must be whole numbers from 0 to {vocab_size - 1}")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation in the model's own chat template, up to where the assistant's answer begins.

    The template is the checkpoint's: transformers renders it in jinja2's sandbox, without access to attributes that
    begin with an underscore or to anything outside.

    Raises:
        DataError: there is no template, or it fails on these messages.
    """
    if tokenizer.hf is None or not tokenizer.hf.chat_template:
        raise DataError(f"{tokenizer.path}: the tokenizer has no chat template; give the prompt as text")
    try:
        text = tokenizer.hf.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it may fail in any way
        raise DataError(f"{tokenizer.path}: the chat template fails on these messages: {error}") from None
    return list(tokenizer.hf.encode(text, add_special_tokens=False))


def end_of_text(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end generation: what the model's configuration names (one or several), or else the tokenizer's own.

    Raises:
        CheckpointError: ``eos_token_id`` is not a token id or a list of them.
    """
    for path in (directory / "generation_config.json", directory / "config.json"):
        content = read_json(path) if path.is_file() else None
        value = content.get("eos_token_id") if isinstance(content, dict) else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in ids):
            raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
        return frozenset(ids)
    return frozenset() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])
