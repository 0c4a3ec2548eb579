"""The bodies of the HTTP API, as OpenAI defines them, with the fields that are added to them.

A field that this server does not know is refused by name. So is one of OpenAI's that it cannot honour, unless its value
asks for nothing. Fields that only label a request are ignored; the type ``Ignored`` marks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megatron_ee.config.validation import Strict
from megatron_ee.errors import shown
from megatron_ee.inference.requests import Draft, Mode

MAX_LISTED = 20
"""Most alternatives per token in ``logprobs``, as in OpenAI's chat API and in vLLM."""
Ids = Annotated[list[int], Field(min_length=1)]
Ignored = Annotated[Any, Field(default=None, description="Ignored.")]
NotSupported = Annotated[Any, Field(default=None, description="Not supported; only a value that asks for nothing.")]

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    "refusal": (),
    "annotations": ([],),
    "tool_calls": ([],),
}
"""By unsupported field, the values besides null that ask for nothing."""


class _Body(Strict):
    """A body or a part of one, whose unsupported fields must ask for nothing."""

    @model_validator(mode="after")
    def _asks_for_nothing_else(self) -> Self:
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name, None)
            # Compared with types: true is not 1.
            if value is not None and not any(value == each and type(value) is type(each) for each in neutral):
                raise ValueError(f"{name}: {shown(value)} is not supported; leave it out")
        return self


class StreamOptions(Strict):
    """How an answer is streamed.

    Attributes:
        include_usage: end the stream with a chunk that holds the usage.
        include_obfuscation: ignored; no padding is sent.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class EarlyExitFields(Strict):
    """Early exit of one request. What is left out is decided by the server's rules.

    Attributes:
        mode: ``full``, ``threshold`` or ``speculative``.
        threshold: a token leaves at the first exit that is at least this confident.
        exits: layers of the exits to use.
        policy: an exit policy in its JSON form, or only its name.
        draft: draft settings of speculative mode.
        task: the task whose certificate and policy apply.
        uncertified: leave early also where the task's certificate does not cover the request.
        group: the request's group, for a certificate with thresholds by group.
    """

    mode: Mode | None = None
    threshold: float | None = Field(default=None, gt=0)
    exits: list[int] | None = None
    policy: str | dict[str, Any] | None = None
    draft: Draft | None = None
    task: str | None = Field(default=None, max_length=200)
    uncertified: bool | None = None
    group: str | None = Field(default=None, max_length=200)


class _GenerationRequest(_Body):
    """What the bodies of completions and chats have in common.

    Attributes:
        model: name of the model, as ``/v1/models`` lists it.
        stream: answer with server-sent events.
        stream_options: how.
        n: number of answers.
        max_tokens: maximum number of tokens of an answer.
        stop: strings that end an answer; they are not part of it.
        seed: of the random numbers; a new one for each request without it.
        temperature: 0 is greedy.
        top_p: keep only the most likely tokens whose total probability reaches this.
        frequency_penalty: subtracted from a token's logit for each time that it is in the answer so far.
        presence_penalty: subtracted from a token's logit if it is in the answer so far.
        top_k: keep only so many most likely tokens; 0 or -1 is off. This and the fields up to
            ``return_tokens_as_token_ids`` are vLLM's.
        min_p: keep only tokens with at least this share of the largest probability.
        repetition_penalty: makes tokens of prompt and answer less likely, if above 1.
        ignore_eos: do not end at an end-of-text token.
        stop_token_ids: tokens that end an answer.
        return_tokens_as_token_ids: name tokens in ``logprobs`` as ``token_id:NUMBER``.
        priority: ``important`` for full mode. The header ``X-Priority`` says the same.
        early_exit: how tokens leave early.
        vllm_xargs: the fields of ``early_exit``, for clients that can add fields only here.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=0)
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Literal["default", "important"] | None = None
    early_exit: EarlyExitFields | None = None
    vllm_xargs: dict[str, str | bool | int | float | list[str | int | float]] | None = None
    logit_bias: NotSupported
    user: Ignored
    metadata: Ignored
    store: Ignored
    service_tier: Ignored
    safety_identifier: Ignored
    prompt_cache_key: Ignored

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        return self


class CompletionRequest(_GenerationRequest):
    """Body of ``/v1/completions``.

    Attributes:
        prompt: a text, token ids, or a list of either.
        echo: start each answer with its prompt.
        logprobs: number of most probable tokens to list besides each token of the answer, and of the prompt with
            ``echo``.
    """

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LISTED)
    best_of: NotSupported
    suffix: NotSupported


class TextPart(Strict):
    """A part of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


class PromptMessage(_Body):
    """A message of a conversation. The fields of an answer's message are accepted where they hold nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: NotSupported
    annotations: NotSupported
    audio: NotSupported
    function_call: NotSupported
    tool_calls: NotSupported


class ChatCompletionRequest(_GenerationRequest):
    """Body of ``/v1/chat/completions``.

    Attributes:
        messages: the conversation so far.
        max_completion_tokens: OpenAI's newer name of ``max_tokens``.
        logprobs: whether to return the log-probability of each token.
        top_logprobs: number of most probable tokens to list besides each token.
    """

    messages: list[PromptMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LISTED)
    parallel_tool_calls: Ignored
    tools: NotSupported
    tool_choice: NotSupported
    functions: NotSupported
    function_call: NotSupported
    response_format: NotSupported
    modalities: NotSupported
    audio: NotSupported
    prediction: NotSupported
    reasoning_effort: NotSupported
    web_search_options: NotSupported

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens: differs from max_completion_tokens; give only one of them")
        if self.max_tokens == 0:
            raise ValueError("max_tokens: must be at least 1, not 0")
        return self


class TokenizeRequest(Strict):
    """Body of ``/tokenize``, as vLLM's.

    Attributes:
        model: name of the model.
        prompt: a text, or
        messages: a conversation, which the chat template renders.
        add_special_tokens: add the special tokens that a prompt gets; with ``prompt`` only.
        return_token_strs: return the tokens' names in the vocabulary too.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[PromptMessage] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either a prompt or messages")
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens: the chat template decides this for messages; leave it out")
        return self
