"""Write the choices of a response, whole or in chunks: one writer for completions, and one for chats."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from megatron_ee.inference.requests import Completion, Event, FinishReason, Token
from megatron_ee.serving.api.logprobs import LogprobWriter, ScoredToken, scored
from megatron_ee.serving.api.response_bodies import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    ExitDetails,
    ExitSummary,
    PromptDetails,
    Reason,
    Usage,
    dumped,
)
from megatron_ee.serving.exit_record import exit_statistics
from megatron_ee.serving.generation import GenerationRun
from megatron_ee.serving.service import Service


class ResponseWriter(ABC):
    """Writes the response to one HTTP request as JSON.

    Args:
        service: with the tokenizer.
        run: the request.
    """

    body: ClassVar[type[CompletionResponse] | type[ChatCompletionResponse]]
    chunk_body: ClassVar[type[CompletionResponse] | type[ChatCompletionChunk]]

    def __init__(self, service: Service, run: GenerationRun) -> None:
        generation = run.generation
        self.run, self.generation = run, generation
        self.heading: dict[str, Any] = {"id": run.id, "created": int(run.created), "model": service.model_name}
        self.indices = range(len(run.parts) * generation.samples)
        self.logprobs: list[LogprobWriter] = []
        if generation.logprobs is not None:
            self.logprobs = [
                LogprobWriter(
                    service.texts,
                    service.tokenizer,
                    run.part(index).prompt,
                    echo=generation.echo,
                    as_ids=generation.tokens_as_ids,
                )
                for index in self.indices
            ]

    @abstractmethod
    def opening(self) -> list[str]:
        """The chunks before the first event."""

    def chunk(self, index: int, event: Event, *, last: bool) -> str | None:
        """The chunk of an event; None if there is nothing to say.

        Args:
            index: of the choice.
            event: of its output.
            last: whether all outputs have ended with it.
        """
        if not (event.text or event.tokens or event.completion is not None):
            return None
        return self._chunk([self._chunk_choice(index, event)], summary=self._summary() if last else None)

    def closing(self) -> str:
        """The chunk that holds the usage."""
        return self._chunk([], usage=self._usage())

    def whole(self) -> str:
        """The whole response, when all outputs have ended."""
        completions = self.run.completions or [_NOTHING] * len(self.indices)
        choices = [self._choice(index, completion) for index, completion in enumerate(completions)]
        return dumped(self.body(**self.heading, choices=choices, usage=self._usage(), early_exit=self._summary()))

    @abstractmethod
    def _choice(self, index: int, completion: Completion) -> Any:
        """A choice of a whole response."""

    @abstractmethod
    def _chunk_choice(self, index: int, event: Event) -> Any:
        """The choice of a chunk."""

    def _chunk(self, choices: list[Any], usage: Usage | None = None, summary: ExitSummary | None = None) -> str:
        chunk = self.chunk_body(**self.heading, choices=choices, usage=usage, early_exit=summary)
        return dumped(chunk, usage=self.generation.include_usage)

    def _usage(self) -> Usage:
        completions = self.run.completions
        prompt = sum(len(each.ids) for each in self.generation.prompts)
        generated = sum(len(each.tokens) for each in completions)
        # Of each prompt once: its other outputs share the KV of the first.
        cached = sum(part.completions[0].statistics["reused_tokens"] for part in self.run.parts if part.completions)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
        )

    def _summary(self) -> ExitSummary:
        """What early exit did. The decisions of all prompts are alike."""
        decision, found = self.run.parts[0].decision, exit_statistics(self.run.completions)
        layers = found["tokens_by_layer"]
        weighted = sum(int(layer) * count for layer, count in layers.items())
        return ExitSummary(
            mode=decision.request.mode,
            policy=decision.policy,
            tier=decision.tier,
            task=decision.task,
            reason=decision.reason,
            calibration=decision.request.coverage,
            tokens_by_layer=layers,
            mean_exit_layer=weighted / found["tokens"] if found["tokens"] else None,
            layers_per_token=found["layers_per_token"],
            proposed=found["proposed"],
            accepted=found["accepted"],
        )


_NOTHING = Completion(text="", tokens=(), pieces=(), finish_reason="length", statistics={})
"""In place of the completions of a request that wants none."""


class CompletionWriter(ResponseWriter):
    """Writes responses of ``/v1/completions``."""

    body = chunk_body = CompletionResponse

    def opening(self) -> list[str]:
        """See ``ResponseWriter``: the prompts, with ``echo``."""
        if not self.generation.echo:
            return []
        reason: Reason | None = "length" if self.generation.max_tokens == 0 else None
        chunks = []
        for index in self.indices:
            part = self.run.part(index)
            logprobs = self._logprobs(index, part.scores)
            choice = CompletionChoice(index=index, text=part.prompt.text, logprobs=logprobs, finish_reason=reason)
            chunks.append(self._chunk([choice]))
        return chunks

    def _choice(self, index: int, completion: Completion) -> CompletionChoice:
        part = self.run.part(index)
        return CompletionChoice(
            index=index,
            text=(part.prompt.text if self.generation.echo else "") + completion.text,
            logprobs=self._logprobs(index, part.scores, completion.tokens),
            finish_reason=reason_of(completion.finish_reason),
            early_exit=exit_details(completion.tokens, completion.pieces),
        )

    def _chunk_choice(self, index: int, event: Event) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=event.text,
            logprobs=self._logprobs(index, (), event.tokens),
            finish_reason=None if event.completion is None else reason_of(event.completion.finish_reason),
            early_exit=exit_details(event.tokens, event.pieces),
        )

    def _logprobs(
        self, index: int, prompt: Sequence[ScoredToken], tokens: Iterable[Token] = ()
    ) -> CompletionLogprobs | None:
        return self.logprobs[index].completion_logprobs([*prompt, *scored(tokens)]) if self.logprobs else None


class ChatWriter(ResponseWriter):
    """Writes responses of ``/v1/chat/completions``."""

    body, chunk_body = ChatCompletionResponse, ChatCompletionChunk

    def opening(self) -> list[str]:
        """See ``ResponseWriter``: the role of each choice's message."""
        delta = ChatDelta(role="assistant", content="")
        return [self._chunk([ChatChunkChoice(index=index, delta=delta)]) for index in self.indices]

    def _choice(self, index: int, completion: Completion) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(content=completion.text),
            logprobs=self._logprobs(index, completion.tokens),
            finish_reason=reason_of(completion.finish_reason),
            early_exit=exit_details(completion.tokens, completion.pieces),
        )

    def _chunk_choice(self, index: int, event: Event) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=event.text or None),
            logprobs=self._logprobs(index, event.tokens),
            finish_reason=None if event.completion is None else reason_of(event.completion.finish_reason),
            early_exit=exit_details(event.tokens, event.pieces),
        )

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> ChatLogprobs | None:
        return self.logprobs[index].chat_logprobs(scored(tokens)) if self.logprobs and tokens else None


def new_id(*, chat: bool) -> str:
    """The id of a response."""
    return f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"


def reason_of(reason: FinishReason) -> Reason:
    """OpenAI's reason for the end of an answer."""
    return "stop" if reason in ("eos", "stop") else "length"


def exit_details(tokens: Sequence[Token], pieces: Sequence[str]) -> ExitDetails:
    """Where tokens left, and the text that each added."""
    return ExitDetails(
        layers=[token.layer for token in tokens],
        confidences=[round(token.confidence, 4) for token in tokens],
        pieces=list(pieces),
    )
