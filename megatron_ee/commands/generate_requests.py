"""Builds requests from flat settings: the options of a command, or the keys of a line in a file of prompts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.commands.engine_options import setting_name
from megatron_ee.config.untrusted import json_lines, parse_object
from megatron_ee.config.validation import validated
from megatron_ee.data.chat import check_messages
from megatron_ee.errors import ConfigError, UserError, common_error, shown
from megatron_ee.inference.policy import POLICIES
from megatron_ee.inference.released import Released
from megatron_ee.inference.requests import Request, encode_chat, prompt_ids
from megatron_ee.inference.sampling import Sampling

if TYPE_CHECKING:
    from megatron_ee.inference.engine import Engine

POLICY = ("thresholds", "measure", "max_deferred", "min_full", "backoff")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
OTHERS = ("samples", "max_tokens", "stop", "ignore_eos", "echo", "logprobs", "exits")
FIELDS = ("mode", "policy", "threshold", *POLICY, "draft_exit", "draft_length", *SAMPLING, *OTHERS)
"""Names of a request's settings; ``generate --help`` describes them."""
PROMPTS = ("prompt", "messages")


@dataclass(frozen=True)
class FileRequest:
    """A request from a file of prompts.

    Attributes:
        line: its number, from 1.
        id: the line's ``id``, which is returned with the answer; None without one.
        messages: the conversation that the prompt is made of; None for a text to continue.
        request: the request.
    """

    line: int
    id: str | int | None
    messages: list[dict[str, Any]] | None
    request: Request

    @property
    def text(self) -> str:
        """What is asked, for a reader: the text to continue, or the last message."""
        return str(self.request.prompt if self.messages is None else self.messages[-1]["content"])


def make_request(prompt: str | Sequence[int], settings: Mapping[str, Any], *, has_exits: bool) -> Request:
    """A request with these settings, by the names in ``FIELDS``. Those that are left out have their defaults.

    A ``mode`` of None means ``threshold`` if there are exits, else ``full``. A ``threshold`` or ``backoff`` of None
    means the policy's default.
    """
    mode, name = settings.get("mode"), settings.get("policy", "threshold")
    if not isinstance(name, str) or name not in POLICIES:
        raise ConfigError(f"policy: must be one of {', '.join(POLICIES)}, not {shown(name)}")
    policy = _chosen(settings, ("threshold", *POLICY))
    policy = {key: value for key, value in policy.items() if value is not None or key not in ("threshold", "backoff")}
    return validated(
        Request,
        {
            "prompt": prompt,
            "mode": ("threshold" if has_exits else "full") if mode is None else mode,
            "policy": validated(POLICIES[name], policy),
            "draft": {"exit": settings.get("draft_exit"), "length": settings.get("draft_length")},
            "sampling": validated(Sampling, _chosen(settings, SAMPLING)),
            **_chosen(settings, OTHERS),
        },
    )


def _chosen(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}


def user_prompt(text: str, released: Released, *, chat: bool) -> str | list[int]:
    """The prompt for a text: the text, or with ``chat`` the token ids of a conversation with this user message.

    An empty text stays empty.
    """
    messages = _user_messages(text, chat)
    return text if messages is None else _encoded_chat(messages, released)


def _user_messages(text: str, chat: bool) -> list[dict[str, Any]] | None:
    return [{"role": "user", "content": text}] if chat and text else None


def _encoded_chat(messages: Sequence[Mapping[str, Any]], released: Released) -> list[int]:
    return encode_chat(released.tokenizer, messages, released.model.architecture.max_generated_positions)


def check_request(request: Request, released: Released) -> None:
    """Check a request against a model that is open but not loaded.

    Raises:
        ConfigError: the request is invalid; the message names the field.
    """
    arch = released.model.architecture
    gates = [spec.layer for spec in released.exits if spec.gate]
    request.check([spec.layer for spec in released.exits], arch.num_layers, gates=gates)
    prompt_ids(request, released.tokenizer, arch.vocab_size, arch.max_generated_positions)


def read_requests(
    path: Path, defaults: Mapping[str, Any], released: Released, *, chat: bool = False
) -> list[FileRequest]:
    """The checked requests of a file of JSON lines. Blank lines are ignored.

    Each line is an object with ``prompt``, a text to continue, or ``messages``, a conversation for the model's chat
    template, and optionally an ``id``. Other keys are settings, which override ``defaults``.

    Args:
        defaults: the settings that a line may give, some of ``FIELDS``, with their values where it does not.
        chat: treat a ``prompt`` as a user's message.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or a line is invalid. The message names file, line and
            key.
    """
    requests = []
    try:
        lines = list(json_lines(path))
    except OSError as error:
        raise common_error(f"--prompts: {path} cannot be read: {error.strerror or error}") from None
    for number, line in lines:
        try:
            requests.append(_read_line(number, parse_object(line), defaults, released, chat=chat))
            check_request(requests[-1].request, released)
        except UserError as error:
            field, colon, rest = str(error).partition(":")
            raise common_error(f"{path}:{number}: {setting_name(field)}{colon}{rest}") from None
    if not requests:
        raise common_error(f"--prompts: {path} holds no prompt; each line is a JSON object with a prompt or messages")
    return requests


def check_memory(requests: Sequence[FileRequest], engine: Engine, path: Path) -> None:
    """Refuse requests of ``path`` that the loaded model has no memory for.

    Raises:
        ConfigError: naming file, line and key.
    """
    for each in requests:
        try:
            engine.check(each.request)
        except ConfigError as error:
            raise ConfigError(f"{path}:{each.line}: {error}") from None


def _read_line(
    number: int, given: dict[str, Any], defaults: Mapping[str, Any], released: Released, *, chat: bool
) -> FileRequest:
    keys = ("id", *PROMPTS, *defaults)
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"possible: {', '.join(keys)}"
            raise ConfigError(f"{shown(key)}: unknown key; {hint}")
    if sum(key in given for key in PROMPTS) != 1:
        raise ConfigError("give either a prompt or messages")
    name = given.pop("id", None)
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise ConfigError(f"id: must be text or a whole number, not {shown(name)}")
    messages = _conversation(given, chat)
    prompt = given["prompt"] if messages is None else _encoded_chat(messages, released)
    request = make_request(prompt, {**defaults, **given}, has_exits=bool(released.exits))
    return FileRequest(number, name, messages, request)


def _conversation(given: Mapping[str, Any], chat: bool) -> list[dict[str, Any]] | None:
    """The line's conversation; None for a text to continue."""
    if "messages" in given:
        check_messages(given["messages"], "messages")
        return list(given["messages"])
    prompt = given["prompt"]
    if not isinstance(prompt, str):
        raise ConfigError(f"prompt: must be text, not {shown(prompt)}")
    return _user_messages(prompt, chat)
