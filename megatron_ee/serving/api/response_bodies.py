"""The bodies of responses, as OpenAI defines them, with ``early_exit`` as an additional field."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from megatron_ee.inference.requests import Coverage, Mode

Reason = Literal["stop", "length"]


class ErrorInfo(BaseModel):
    """What is wrong with a request.

    Attributes:
        message: one line.
        type: class of errors, such as ``invalid_request_error``.
        param: the field or header that is wrong; None if it is not one.
        code: OpenAI's or this server's short name of the error, or None.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every response that is an error."""

    error: ErrorInfo


class PromptDetails(BaseModel):
    """``cached_tokens``: prompt tokens whose KV was copied from an earlier request."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Numbers of tokens. A prompt counts once for all its answers; an end-of-text token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()


class ExitDetails(BaseModel):
    """Where the tokens of one answer, or of one chunk of it, left.

    Attributes:
        layers: for each token, the layer of the exit that emitted it.
        confidences: for each token, the confidence of that exit.
        pieces: for each token, the text that became final with it.
    """

    layers: list[int]
    confidences: list[float]
    pieces: list[str]


class ExitSummary(BaseModel):
    """What early exit did for one HTTP request, over all its answers.

    Attributes:
        mode: in which the request ran.
        policy: what set the exits, in a few words, such as ``threshold 0.8``; a label, not a policy in its JSON form.
        tier: ``important`` if it was marked so, or if its key is.
        task: of the rules and the certificate.
        reason: why the answers are not certified although the task has a certificate, or that the request is
            important; None otherwise.
        calibration: what the certificate says of the answers; None without one.
        tokens_by_layer: number of tokens by the layer of the exit that emitted them.
        mean_exit_layer: mean layer of the tokens; None without tokens.
        layers_per_token: decoder layers run per token after an answer's first; None without such tokens.
        proposed: tokens that exits proposed as drafts, over all rounds.
        accepted: of them, those that the model accepted.
    """

    mode: Mode
    policy: str
    tier: str
    task: str
    reason: str | None = None
    calibration: Coverage | None = None
    tokens_by_layer: dict[str, int] = Field(default_factory=dict)
    mean_exit_layer: float | None = None
    layers_per_token: float | None = None
    proposed: int = 0
    accepted: int = 0


class CompletionLogprobs(BaseModel):
    """Log-probabilities of ``/v1/completions``: one entry per token in each list.

    Attributes:
        tokens: texts of the tokens; ``bytes:...`` for a part of a character.
        token_logprobs: None for the first token of a prompt.
        top_logprobs: the most probable tokens by text, and the token itself; None for the first token of a prompt.
        text_offset: where the token begins in ``text``.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One choice of ``/v1/completions``, or a chunk of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason | None = None
    early_exit: ExitDetails | None = None


class CompletionResponse(BaseModel):
    """Response of ``/v1/completions``, or a chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    early_exit: ExitSummary | None = None


class TokenLogprob(BaseModel):
    """Log-probability of a token.

    Attributes:
        token: its text.
        logprob: natural logarithm; -9999 for a token that cannot be chosen.
        bytes: its UTF-8 bytes; several tokens may share a character. None if they are not known.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """Log-probability of a token of the answer, and of the most probable ones at its position."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of ``/v1/chat/completions``."""

    content: list[ChosenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """The message of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatDelta(BaseModel):
    """The part of a message that a chunk adds. Fields that are left out are not sent."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _only_given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}


class ChatChoice(BaseModel):
    """One choice of ``/v1/chat/completions``."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason
    early_exit: ExitDetails | None = None


class ChatChunkChoice(BaseModel):
    """A chunk of a choice of ``/v1/chat/completions``."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None
    early_exit: ExitDetails | None = None


class ChatCompletionResponse(BaseModel):
    """Response of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    early_exit: ExitSummary | None = None


class ChatCompletionChunk(BaseModel):
    """A chunk of a choice of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    early_exit: ExitSummary | None = None


class ModelEntry(BaseModel):
    """A model of ``/v1/models``. ``max_model_len`` is its number of positions, as in vLLM."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "megatron_ee"
    max_model_len: int


class ModelList(BaseModel):
    """Response of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class TokenizeResponse(BaseModel):
    """Response of ``/tokenize``, as vLLM's."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = None


class ServerStatus(BaseModel):
    """Response of ``/health`` and ``/ready``."""

    status: str


class ExitsResponse(BaseModel):
    """Response of ``/v1/exits``.

    Attributes:
        num_layers: layers of the model.
        exits: the exits: layer, kind of body, and whether there is a gate.
        modes: that requests may ask for.
        max_tokens: the most that a request may ask for.
        rules: the rules by task, with the certificates in force. What is said of requests that name no task, of the
            tasks that they may name, of their priority and of their own choice holds for the API key that asks.
        audits: state of the tests for drift, by task; None without an exit log and certificates.
    """

    num_layers: int
    exits: list[dict[str, Any]]
    modes: list[Mode]
    max_tokens: int
    rules: dict[str, Any]
    audits: dict[str, Any] | None = None


def dumped(response: CompletionResponse | ChatCompletionResponse | ChatCompletionChunk, *, usage: bool = True) -> str:
    """A response or a chunk as JSON, without ``early_exit`` if it is None, and ``usage`` only where it belongs."""
    left_out = {name for name, kept in (("usage", usage), ("early_exit", response.early_exit is not None)) if not kept}
    return response.model_dump_json(exclude=left_out)
