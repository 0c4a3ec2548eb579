"""Chat conversations as tokens with a mask. The chat template renders them; only the assistant's tokens are labels.

A conversation is rendered and tokenised once, as at inference. The assistant's turns are spans of the rendered text,
which the tokenizer's offsets map to tokens. So it does not matter if the tokenizer splits a prefix differently from the
whole text. The spans are those that the template marks with ``{% generation %}``. Without marks, a turn begins after
the text that the template writes before any answer (such as an empty thinking block), and ends where the rendering of
the messages up to it ends.

Some templates render a turn differently once later turns follow: for example, they drop its thinking block. Such a turn
is trained as the model generates it: in a document that ends with this turn.

An answer that the model itself has generated needs none of this: it stands behind the generation prompt as it was
generated, whatever the template makes of it later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.data.tokenizer_backends import Span
from megatron_ee.data.tokenizer_files import DEFAULT_TEMPLATE, TOOLS_TEMPLATE
from megatron_ee.errors import DataError, shown

Message = Mapping[str, Any]
Document = tuple[list[int], list[bool]]
"""Token ids, and whether each is a label."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the mark as transformers recognises it
_OTHER_ANSWER = "\ue000"  # a private-use character, so that neither a template nor an answer begins with it


@dataclass(frozen=True)
class _Turn:
    """An assistant's message.

    Attributes:
        text: the rendered conversation up to and including this turn. Every rendering that shows the turn unchanged
            begins with this text.
        span: its place in ``text``.
    """

    text: str
    span: Span


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: provides the special tokens that the template writes.
        template: replaces the tokenizer's own templates.

    Raises:
        DataError: there is no chat template, or the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        if template is None and not tokenizer.templates:
            raise DataError(
                f"{tokenizer.path}: the tokenizer has no chat template; give the directory of a chat model, "
                "with chat_template in tokenizer_config.json or a chat_template.jinja, or give --chat-template"
            )
        if tokenizer.eos_id is None:
            raise DataError(f"{tokenizer.path}: the tokenizer has no end-of-text token; set eos_token")
        self._tokenizer = tokenizer
        self._template = template
        self._eos_id: int = tokenizer.eos_id
        self._special = tuple(tokenizer.special)

    def encode(self, messages: Sequence[Message], where: str, tools: Any = None) -> list[Document]:
        """Convert a conversation to one or more documents, each ending with end-of-text.

        There is one document, unless the template renders an assistant's turn differently once later turns follow. Each
        turn is trained in exactly one document.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            where: file and line, for errors.
            tools: passed to the template.

        Raises:
            DataError: malformed messages, a template that refuses them or renders a turn's prompt differently once it
                is answered, or no token to train on.
        """
        check_messages(messages, where)
        answered = messages[-1]["role"] == "assistant"
        # Looked up each time: a tokenizer may have another template for conversations with tools.
        if _GENERATION.search(self._template or chosen_template(self._tokenizer, tools)):
            text, spans = self._render(messages, where, tools, marks=True)
            # The end-of-text token after an answer is a label only if the answer itself is marked.
            documents = [self._document(text, spans, answered and any(start < end for start, end in spans))]
        else:
            documents = self._split(messages, where, tools, answered)
        if not any(any(mask) for _, mask in documents):
            raise DataError(f"{where}: no token of this conversation is an assistant's; nothing to train on")
        return documents

    def encode_generated(
        self, messages: Sequence[Message], end_token: str | None, where: str, tools: Any = None
    ) -> Document:
        """A conversation whose last message is the model's own output, exactly as it was generated.

        Only that message is trained. Earlier answers are part of its prompt.

        Args:
            messages: as for ``encode``; the last is the assistant's.
            end_token: the token that the model ended its output with, which is trained too. None for an output that was
                cut: then nothing is trained after it.
            where: file and line, for errors.
            tools: passed to the template.

        Raises:
            DataError: malformed messages, a last message that is not an answer in text, a template that refuses the
                prompt, an unknown ``end_token``, or no token to train on.
        """
        check_messages(messages, where)
        *prompt, answer = messages
        if not prompt or answer["role"] != "assistant" or not isinstance(answer.get("content"), str):
            raise DataError(f"{where}: has an end_token, so the last message must be the assistant's answer to others")
        end_id = None if end_token is None else self._tokenizer.id_of(end_token)
        if end_token is not None and end_id is None:
            raise DataError(f"{where}: end_token {shown(end_token)} is no token of {self._tokenizer.path}")
        before, _ = self._render(prompt, where, tools, prompt=True)
        text = before + answer["content"]
        ids, offsets = self._tokenizer.encode_spans(text)
        mask = _mask(offsets, [(len(before), len(text))])
        if end_id is not None:
            ids.append(end_id)
            mask.append(True)
        if ids[-1] != self._eos_id:
            ids.append(self._eos_id)
            mask.append(False)
        if not any(mask):
            raise DataError(f"{where}: the answer is empty; nothing to train on")
        return ids, mask

    def _split(self, messages: Sequence[Message], where: str, tools: Any, answered: bool) -> list[Document]:
        """The whole conversation, and each shorter part that renders some turn differently from all longer parts."""
        turns = [self._turn(messages, i, where, tools) for i, m in enumerate(messages) if m["role"] == "assistant"]
        text, _ = self._render(messages, where, tools)
        documents: list[Document] = []
        while turns:
            spans = [turn.span for turn in turns if text.startswith(turn.text)]
            if spans:
                documents.append(self._document(text, spans, answered))
            turns = [turn for turn in turns if not text.startswith(turn.text)]
            if turns:
                text, answered = turns[-1].text, True
        return documents[::-1]

    def _turn(self, messages: Sequence[Message], index: int, where: str, tools: Any) -> _Turn:
        prompt, _ = self._render(messages[:index], where, tools, prompt=True)
        text, _ = self._render(messages[: index + 1], where, tools)
        if not text.startswith(prompt):
            # The prompt may end with text that this answer lacks, such as the start of a thinking block.
            history, _ = self._render(messages[:index], where, tools)
            if _common(prompt, text) < _common(prompt, history):
                raise self._ambiguous(where, index)
        header = self._header(messages, index, where, tools)
        if header is not None and not text.startswith(header):
            header = None  # the template begins this answer differently, for example with its thinking
        if text.startswith(prompt):
            start = len(prompt)
        elif header is not None:
            start = min(_common(prompt, text), len(header))
        else:
            raise self._ambiguous(where, index)
        if header is not None:
            # Most tokenizers join a space with the next word, here the first word of the answer.
            start = max(start, len(header.rstrip(" ")))
        end = self._turn_end(text, start)
        content = messages[index].get("content")
        if end <= start and content and content.strip():
            raise DataError(
                f"{where}: message {index + 1}: the chat template leaves this answer out; correct it, or give "
                "another one with --chat-template"
            )
        return _Turn(text, (start, end))

    def _header(self, messages: Sequence[Message], index: int, where: str, tools: Any) -> str | None:
        """The text that the template writes before any plain answer; None if it does not render plain answers."""
        # Only role and content: thinking in its own key, or a tool call, is part of the assistant's answer.
        other = [*messages[:index], {"role": messages[index]["role"], "content": _OTHER_ANSWER}]
        try:
            header, found, _ = self._render(other, where, tools)[0].partition(_OTHER_ANSWER)
        except DataError:  # the template requires other keys too
            return None
        return header if found else None

    def _ambiguous(self, where: str, index: int) -> DataError:
        return DataError(
            f"{where}: message {index + 1}: the chat template renders the messages before it differently once it is "
            "answered, so it is not clear which tokens are the assistant's; use a template with {% generation %} marks "
            "(--chat-template)"
        )

    def _render(
        self, messages: Sequence[Message], where: str, tools: Any, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            return render_chat(self._tokenizer, messages, tools, template=self._template, prompt=prompt, marks=marks)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"{where}: the chat template cannot be rendered: its line {error.lineno}: {error.message}; correct it, "
                "or give another one with --chat-template"
            ) from None
        except Exception as error:  # a template can raise any exception
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{where}: the chat template refuses this conversation: {reason[:300]}") from None

    def _turn_end(self, text: str, start: int) -> int:
        """End of the turn that ends ``text``: white space after the end-of-turn token is not part of the turn."""
        stripped = text.rstrip()
        if len(stripped) > start and stripped.endswith(self._special):
            return len(stripped)
        return len(text)

    def _document(self, text: str, spans: Sequence[Span], answered: bool) -> Document:
        """Tokenise a rendered conversation. The last token is end-of-text, which is a label if it ends an answer."""
        ids, offsets = self._tokenizer.encode_spans(text)
        mask = _mask(offsets, spans)
        end = len(text.rstrip())
        last = len(ids)
        while last and offsets[last - 1][0] >= end:
            last -= 1
        if last and ids[last - 1] == self._eos_id:
            del ids[last:], mask[last:]
            mask[-1] = mask[-1] or answered
        else:
            ids.append(self._eos_id)
            mask.append(answered)
        return ids, mask


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Any = None,
    *,
    template: str | None = None,
    prompt: bool = False,
    marks: bool = False,
) -> tuple[str, list[Span]]:
    """Render a conversation with a chat template.

    The template is untrusted: transformers renders it in jinja2's sandbox, without access to attributes that begin with
    an underscore or to anything outside.

    Args:
        tokenizer: provides the special tokens, and the template if ``template`` is None.
        tools: passed to the template.
        prompt: end with the generation prompt, the text that begins an assistant's answer.
        marks: find the spans between the template's ``{% generation %}`` marks.

    Returns:
        The text, and with ``marks`` the spans.

    Raises:
        Exception: of any type, because a template is a program.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    # As in apply_chat_template: templates handle a missing key better than None.
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    texts, spans = render_jinja_template(
        conversations=[plain],
        tools=tools,
        chat_template=chosen_template(tokenizer, tools) if template is None else template,
        return_assistant_tokens_mask=marks,
        add_generation_prompt=prompt,
        **tokenizer.special_tokens,
    )
    return texts[0], [(int(start), int(end)) for start, end in spans[0]] if marks else []


def chosen_template(tokenizer: Tokenizer, tools: Any = None) -> str:
    """The tokenizer's template for a conversation. Conversations with tools may have their own template.

    Raises:
        DataError: there is no template for this conversation.
    """
    names = [TOOLS_TEMPLATE, DEFAULT_TEMPLATE] if tools is not None else [DEFAULT_TEMPLATE]
    for name in names:
        if name in tokenizer.templates:
            return tokenizer.templates[name]
    there = ", ".join(sorted(tokenizer.templates)) or "none"
    raise DataError(f"{tokenizer.path}: has no chat template named {DEFAULT_TEMPLATE!r}, but: {there}")


def check_messages(messages: Any, where: str) -> None:
    """Check the shape of a conversation.

    Raises:
        DataError: it is malformed; the message names file, line and message.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of at least one {{role, content}}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} must be an object with a role and content")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            if "content" not in message:
                raise DataError(f"{where}: message {number}: content: missing")
            raise DataError(f"{where}: message {number}: content must be text, not {type(message['content']).__name__}")


def _common(*texts: str) -> int:
    """Length of the common prefix."""
    return len(os.path.commonprefix(texts))


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """True for tokens that begin within a span. A token that begins before a span also holds text of the prompt."""
    starts = np.array([start for start, _ in offsets], dtype=np.int64)
    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        mask |= (start <= starts) & (starts < end)
    return [bool(value) for value in mask]
