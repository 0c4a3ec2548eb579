"""The records of tasks: prompts with what is needed to score their answers, from JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self
from unicodedata import normalize

import regex
from pydantic import Field, PrivateAttr, field_validator, model_validator

from megatron_ee.config.untrusted import json_lines, parse_object
from megatron_ee.config.validation import Strict, validated
from megatron_ee.data.chat import check_messages
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import ConfigError, UserError, common_error, shown
from megatron_ee.evaluation.tasks.metrics import is_spaceless, tokens
from megatron_ee.inference.released import Released
from megatron_ee.inference.requests import Request, chat_prompt, check_length, prompt_ids

Ids = tuple[int, ...]
_UNSEEN = regex.compile(r"[\p{Cc}\p{Bidi_Control}]")
"""What a name may not hold, since it changes what a terminal or a page shows beside it."""


class TaskRecord(Strict):
    """One prompt of a task. ``read_records`` reads and tokenizes it.

    Attributes:
        id: its name, unique in a run; default ``FILE:LINE``.
        task: what it belongs to; default the file's name without its ending.
        prompt: a text. With a chat template it is a user's message, otherwise the model continues it.
        messages: a conversation for the chat template, in place of ``prompt``.
        references: right answers. Each of them counts.
        choices: answers to choose from by their likelihood.
        answer: index of the right choice.
        group: whom or what the record stands for, for comparisons between groups. Names in other forms of Unicode
            (NFC) are the same.
    """

    id: str = Field(min_length=1)
    task: str = Field(min_length=1)
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    references: tuple[str, ...] = Field(default=(), strict=False)
    choices: tuple[str, ...] = Field(default=(), strict=False)
    answer: int | None = None
    group: str | None = Field(default=None, min_length=1)
    _where: str = PrivateAttr(default="")
    _prompt_ids: Ids = PrivateAttr(default=())
    _choice_ids: tuple[tuple[Ids, Ids], ...] = PrivateAttr(default=())

    @field_validator("task", "group")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if (found := _UNSEEN.search(value)) is not None:
            raise ValueError(f"holds the control character U+{ord(found[0]):04X}; remove it")
        return normalize("NFC", value)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages")
        for name in ("id", "task", "prompt", "references", "choices", "group"):
            value = getattr(self, name)
            if not all(_is_unicode(text) for text in (value if isinstance(value, tuple) else (value or "",))):
                raise ValueError(f"{name}: is not valid Unicode: it holds half of a surrogate pair")
        for reference in self.references:
            if not tokens(reference):
                raise ValueError(f"references: {shown(reference)} has no letter or digit that could be compared")
        if bool(self.choices) != (self.answer is not None):
            raise ValueError("give choices together with answer, the index of the right one")
        if len(self.choices) == 1 or not all(self.choices):
            raise ValueError("choices: give two or more texts")
        if self.answer is not None and not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer: must be the index of a choice, 0 to {len(self.choices) - 1}, not {self.answer}")
        return self

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return self._where

    @property
    def prompt_ids(self) -> Ids:
        """Token ids of the prompt, for a ``Request``."""
        return self._prompt_ids

    @property
    def choice_ids(self) -> tuple[tuple[Ids, Ids], ...]:
        """Per choice the token ids before it, and its own. A token that the prompt's end shares with it is its own."""
        return self._choice_ids

    @property
    def question(self) -> str:
        """The prompt, or the user's last message."""
        if self.messages is None:
            return self.prompt or ""
        return next((str(each["content"]) for each in reversed(self.messages) if each["role"] == "user"), "")

    @property
    def scored(self) -> bool:
        """Whether the quality of an answer can be told."""
        return bool(self.references or self.choices)


def read_records(paths: Sequence[Path], released: Released, *, quality: bool = False) -> list[TaskRecord]:
    """The checked and tokenized records of files of JSON lines, the records of a task side by side.

    Args:
        paths: the files.
        released: the model, whose tokenizer and chat template the prompts are for.
        quality: every record must have references or choices. Otherwise that may be left out of all records of a task.

    Raises:
        ConfigError: a file cannot be read or is empty, or a line is invalid. The message names file and line.
    """
    records: dict[str, TaskRecord] = {}
    for path in paths:
        before = len(records)
        try:
            lines = list(json_lines(path))
        except OSError as error:
            raise common_error(f"{path}: cannot be read: {error.strerror or error}") from None
        for number, line in lines:
            where = f"{path}:{number}"
            try:
                record = _read_line(line, {"id": f"{path.name}:{number}", "task": path.stem}, released)
                if record.id in records:
                    first = records[record.id].where
                    raise ConfigError(f"id: {shown(record.id)} is that of {first} too; each record needs its own")
                if quality and not record.scored:
                    raise ConfigError("give references, or choices with answer: without them an answer has no quality")
            except UserError as error:
                raise common_error(f"{where}: {error}") from None
            record._where = where
            records[record.id] = record
        if len(records) == before:
            raise common_error(f"{path}: holds no record; each line is a JSON object with a prompt or messages")
    by_task: dict[str, list[TaskRecord]] = {}
    for record in records.values():
        by_task.setdefault(record.task, []).append(record)
    for task in by_task.values():
        _check_alike(task)
    return [record for task in by_task.values() for record in task]


def records_digest(records: Sequence[TaskRecord]) -> str:
    """SHA-256 (hex) of all that the records hold, in their order."""
    return hashlib.sha256(json.dumps([record.model_dump(mode="json") for record in records]).encode()).hexdigest()


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON can hold and tokenizers fail on."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_alike(task: Sequence[TaskRecord]) -> None:
    """Refuse a task of which only some records can be scored: their mean would be that of another task."""
    for name in ("references", "choices"):
        having = [record for record in task if getattr(record, name)]
        if having and len(having) < len(task):
            lacking = next(record for record in task if not getattr(record, name))
            raise common_error(
                f"{lacking.where}: {name}: missing, but {having[0].where} of the same task {shown(lacking.task)} has "
                "them; add them, or give this record another task"
            )


def _read_line(line: bytes, defaults: dict[str, str], released: Released) -> TaskRecord:
    record = validated(TaskRecord, {**defaults, **parse_object(line)})
    arch, tokenizer = released.model.architecture, released.tokenizer
    text, encode, chat = _rendered(record, tokenizer, arch.max_generated_positions)

    def checked(ids: Ids) -> Ids:
        return prompt_ids(Request(prompt=ids), tokenizer, arch.vocab_size, arch.max_generated_positions)

    record._prompt_ids = checked(tuple(encode(text)))
    choices = []
    for choice in record.choices:
        before, own = _split(record.prompt_ids, encode(text + ("" if chat else _space(text, choice)) + choice))
        if not (before and own):
            raise ConfigError(f"choices: {shown(choice)} has no token of its own after the prompt")
        length, most = len(before) + len(own), arch.max_generated_positions
        if length >= most:
            raise ConfigError(
                f"choices: {shown(choice)} and the prompt have {length} tokens; the model reads {most - 1}"
            )
        checked((*before, *own))
        choices.append((before, own))
    record._choice_ids = tuple(choices)
    return record


def _rendered(
    record: TaskRecord, tokenizer: Tokenizer, max_positions: int
) -> tuple[str, Callable[[str], Sequence[int]], bool]:
    """The text of the prompt, what encodes a text that begins with it, and whether the chat template made it."""
    messages = record.messages
    if messages is None:
        prompt = record.prompt or ""
        if not prompt.strip():
            raise ConfigError("prompt: is blank; write a question, or remove the line")
        if not tokenizer.templates:
            check_length(tokenizer, prompt, max_positions)
            return prompt, tokenizer.encode_prompt, False
        messages = [{"role": "user", "content": prompt}]
    check_messages(messages, "messages")
    if messages[-1]["role"] == "assistant":
        raise ConfigError("messages: end with the assistant's answer; leave it out, since the model is to give its own")
    return chat_prompt(tokenizer, messages, max_positions), lambda text: tokenizer.encode_spans(text)[0], True


def _space(text: str, choice: str) -> str:
    """A space between a text and a choice that continues it, unless there is one or the script has none."""
    return "" if text[-1].isspace() or choice[0].isspace() or is_spaceless(choice[0]) else " "


def _split(prompt: Sequence[int], whole: Sequence[int]) -> tuple[Ids, Ids]:
    """``whole`` in two, where it leaves ``prompt``."""
    same = len(os.path.commonprefix([list(prompt), list(whole)]))
    return tuple(whole[:same]), tuple(whole[same:])
