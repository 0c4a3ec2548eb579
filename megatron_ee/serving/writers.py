"""Write the choices of an answer, whole or in chunks: one writer for texts, and one for chats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from megatron_ee.inference.requests import Completion, Event, Token
from megatron_ee.serving.answers import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ExitSummary,
    TextAnswer,
    TextChoice,
    TextLogprobs,
    Usage,
    dumped,
)
from megatron_ee.serving.generation import Running
from megatron_ee.serving.responses import Heading, LogprobWriter, Scored, exit_details, reason_of, scored
from megatron_ee.serving.service import Service


class AnswerWriter(ABC):
    """Writes the answer of one HTTP request as JSON.

    Args:
        service: with the tokenizer.
        running: the request.
        heading: of the answer, and of every chunk of it.
    """

    def __init__(self, service: Service, running: Running, heading: Heading) -> None:
        generation = running.generation
        self.running, self.generation = running, generation
        self.heading: dict[str, Any] = {"id": heading.id, "created": heading.created, "model": heading.model}
        self.indices = range(len(running.parts) * generation.samples)
        self.logprobs: list[LogprobWriter] = []
        if generation.logprobs is not None:
            self.logprobs = [
                LogprobWriter(
                    service.texts,
                    service.tokenizer,
                    running.part(index).prompt,
                    echo=generation.echo,
                    as_ids=generation.tokens_as_ids,
                )
                for index in self.indices
            ]

    @abstractmethod
    def opening(self) -> list[str]:
        """The chunks before the first event."""

    @abstractmethod
    def chunk(self, index: int, event: Event, summary: ExitSummary | None) -> str | None:
        """The chunk of an event; None if there is nothing to say.

        Args:
            index: of the choice.
            event: of its output.
            summary: with the last chunk of the whole answer.
        """

    @abstractmethod
    def closing(self, usage: Usage) -> str:
        """The chunk that holds the usage."""

    @abstractmethod
    def whole(self, completions: Sequence[Completion], usage: Usage, summary: ExitSummary) -> str:
        """The whole answer.

        Args:
            completions: one per choice; none if only the prompts are wanted.
            usage: of all.
            summary: of all.
        """


_NOTHING = Completion(text="", tokens=(), pieces=(), finish_reason="length", statistics={})
"""In place of the completions of a request that wants none."""


def _says_something(event: Event) -> bool:
    return bool(event.text or event.tokens or event.completion is not None)


class TextWriter(AnswerWriter):
    """Writes answers of ``/v1/completions``."""

    def opening(self) -> list[str]:
        """See ``AnswerWriter``: the prompts, with ``echo``."""
        if not self.generation.echo:
            return []
        return [
            self._dumped(
                [
                    TextChoice(
                        index=index,
                        text=self.running.part(index).prompt.text,
                        logprobs=self._logprobs(index, self.running.part(index).scores),
                        finish_reason="length" if self.generation.max_tokens == 0 else None,
                    )
                ]
            )
            for index in self.indices
        ]

    def chunk(self, index: int, event: Event, summary: ExitSummary | None) -> str | None:
        """See ``AnswerWriter``."""
        if not _says_something(event):
            return None
        choice = TextChoice(
            index=index,
            text=event.text,
            logprobs=self._logprobs(index, self._scored(event.tokens)),
            finish_reason=None if event.completion is None else reason_of(event.completion.finish_reason),
            early_exit=exit_details(event.tokens, event.pieces),
        )
        return self._dumped([choice], summary=summary)

    def closing(self, usage: Usage) -> str:
        """See ``AnswerWriter``."""
        return self._dumped([], usage)

    def whole(self, completions: Sequence[Completion], usage: Usage, summary: ExitSummary) -> str:
        """See ``AnswerWriter``."""
        choices = []
        for index in self.indices:
            part = self.running.part(index)
            completion = completions[index] if completions else _NOTHING
            scores = self._scored(completion.tokens)
            choices.append(
                TextChoice(
                    index=index,
                    text=(part.prompt.text if self.generation.echo else "") + completion.text,
                    logprobs=self._logprobs(index, None if scores is None else [*(part.scores or ()), *scores]),
                    finish_reason=reason_of(completion.finish_reason),
                    early_exit=exit_details(completion.tokens, completion.pieces),
                )
            )
        return dumped(TextAnswer(**self.heading, choices=choices, usage=usage, early_exit=summary))

    def _scored(self, tokens: Sequence[Token]) -> list[Scored] | None:
        return [scored(token) for token in tokens] if self.logprobs else None

    def _logprobs(self, index: int, scores: Sequence[Scored] | None) -> TextLogprobs | None:
        return None if scores is None else self.logprobs[index].text_logprobs(scores)

    def _dumped(self, choices: list[TextChoice], usage: Usage | None = None, summary: ExitSummary | None = None) -> str:
        answer = TextAnswer(**self.heading, choices=choices, usage=usage, early_exit=summary)
        return dumped(answer, usage=self.generation.include_usage)


class ChatWriter(AnswerWriter):
    """Writes answers of ``/v1/chat/completions``."""

    def opening(self) -> list[str]:
        """See ``AnswerWriter``: the role of each choice's message."""
        delta = ChatDelta(role="assistant", content="")
        return [self._dumped([ChatChunkChoice(index=index, delta=delta)]) for index in self.indices]

    def chunk(self, index: int, event: Event, summary: ExitSummary | None) -> str | None:
        """See ``AnswerWriter``."""
        if not _says_something(event):
            return None
        choice = ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=event.text or None),
            logprobs=self._logprobs(index, event.tokens),
            finish_reason=None if event.completion is None else reason_of(event.completion.finish_reason),
            early_exit=exit_details(event.tokens, event.pieces),
        )
        return self._dumped([choice], summary=summary)

    def closing(self, usage: Usage) -> str:
        """See ``AnswerWriter``."""
        return self._dumped([], usage)

    def whole(self, completions: Sequence[Completion], usage: Usage, summary: ExitSummary) -> str:
        """See ``AnswerWriter``."""
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=completion.text),
                logprobs=self._logprobs(index, completion.tokens),
                finish_reason=reason_of(completion.finish_reason),
                early_exit=exit_details(completion.tokens, completion.pieces),
            )
            for index, completion in enumerate(completions)
        ]
        return dumped(ChatAnswer(**self.heading, choices=choices, usage=usage, early_exit=summary))

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if not self.logprobs or not tokens:
            return None
        return self.logprobs[index].chat_logprobs([scored(token) for token in tokens])

    def _dumped(
        self, choices: list[ChatChunkChoice], usage: Usage | None = None, summary: ExitSummary | None = None
    ) -> str:
        chunk = ChatChunk(**self.heading, choices=choices, usage=usage, early_exit=summary)
        return dumped(chunk, usage=self.generation.include_usage)
