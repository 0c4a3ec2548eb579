"""Chat conversations as tokens with a mask: the model's own template renders, only the assistant's tokens are trained.

The whole conversation is rendered and tokenised once, as at inference; the assistant's turns are spans of its text,
mapped to tokens by the tokenizer's offsets. So a tokenizer that splits a prefix otherwise than the whole does no harm.
The spans are those the template marks with ``{% generation %}``, or else what each assistant message adds to the
rendering of the messages before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import DataError

Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the mark as transformers recognises it


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Raises:
        DataError: the tokenizer has no chat template, no end-of-text token, or cannot tell tokens' places in the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        hf = tokenizer.hf
        if hf is None or not hf.chat_template:
            raise DataError(
                f"{tokenizer.path}: the tokenizer has no chat template; give the directory of a chat model, "
                "with chat_template in tokenizer_config.json or a chat_template.jinja"
            )
        if not hf.is_fast:
            raise DataError(f"{tokenizer.path}: chat data needs a tokenizer.json, which tells where each token stands")
        if tokenizer.eos_id is None:
            raise DataError(f"{tokenizer.path}: the tokenizer has no end-of-text token; set eos_token")
        self._hf = hf
        self._eos_id: int = tokenizer.eos_id
        self._special = tuple(t.content for t in hf.added_tokens_decoder.values() if t.special and t.content)

    def encode(self, messages: Sequence[Message], where: str, tools: Any = None) -> tuple[list[int], list[bool]]:
        """Tokens of one conversation, ending with end-of-text, and which of them are labels to be trained on.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            where: file and line, for errors.
            tools: passed to the template.

        Raises:
            DataError: malformed messages, a template that refuses them, renderings that are no prefixes of one
                another, or no token to train on.
        """
        check_messages(messages, where)
        text, spans = self._render(messages, where, tools)
        encoded = self._hf(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = list(encoded["input_ids"])
        mask = _mask(encoded["offset_mapping"], spans)
        if not any(mask):
            raise DataError(f"{where}: no token of this conversation is an assistant's; nothing to train on")
        self._end(ids, mask, text, encoded["offset_mapping"], trained=messages[-1]["role"] == "assistant")
        return ids, mask

    def _render(self, messages: Sequence[Message], where: str, tools: Any) -> tuple[str, list[Span]]:
        """Text of the conversation and the spans of the assistant's turns in it."""
        # Asked for each time: a tokenizer may keep another template for conversations with tools.
        if _GENERATION.search(self._hf.get_chat_template(tools=tools)):
            return self._template(messages, where, tools, marks=True)
        whole, _ = self._template(messages, where, tools)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._template(messages[:index], where, tools, prompt=True)
            after, _ = self._template(messages[: index + 1], where, tools)
            if not after.startswith(before) or not whole.startswith(after):
                raise DataError(
                    f"{where}: message {index + 1}: the chat template renders earlier messages differently once later "
                    "ones follow, so the assistant's tokens cannot be told; use a template with {% generation %} marks"
                )
            spans.append((len(before), self._turn_end(after, len(before))))
        return whole, spans

    def _template(
        self, messages: Sequence[Message], where: str, tools: Any, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        """Rendered text, and with ``marks`` the spans between the template's generation marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # As apply_chat_template does: templates handle a missing key better than None.
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            texts, spans = render_jinja_template(
                conversations=[plain],
                tools=tools,
                chat_template=self._hf.get_chat_template(tools=tools),
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._hf.special_tokens_map,
            )
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{where}: the chat template refuses this conversation: {reason[:300]}") from None
        return texts[0], [(int(start), int(end)) for start, end in spans[0]] if marks else []

    def _turn_end(self, text: str, start: int) -> int:
        """Where the turn that ends ``text`` ends: the white space a template puts after an end-of-turn token is not
        the assistant's, who has stopped by then."""
        stripped = text.rstrip()
        if len(stripped) > start and stripped.endswith(self._special):
            return len(stripped)
        return len(text)

    def _end(self, ids: list[int], mask: list[bool], text: str, offsets: Sequence[Span], trained: bool) -> None:
        """Make the document end with one end-of-text token, a real label where the assistant spoke last."""
        end = len(text.rstrip())
        last = len(ids)
        while last and offsets[last - 1][0] >= end:
            last -= 1
        if last and ids[last - 1] == self._eos_id:
            del ids[last:], mask[last:]
            mask[-1] = mask[-1] or trained
        else:
            ids.append(self._eos_id)
            mask.append(trained)


def check_messages(messages: Any, where: str) -> None:
    """Check the shape of a conversation.

    Raises:
        DataError: naming file, line and message.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of at least one {{role, content}}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} must be an object with a role and content")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(
                f"{where}: message {number}: content must be text, not {type(message.get('content')).__name__}"
            )


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """A token is the assistant's if it begins within a span; one that begins before also holds what was given."""
    starts = np.array([start for start, _ in offsets], dtype=np.int64)
    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        mask |= (start <= starts) & (starts < end)
    return [bool(value) for value in mask]
