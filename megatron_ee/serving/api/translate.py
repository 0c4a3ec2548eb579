"""From the body of an HTTP request to requests of the engine. Nothing here waits or changes state."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ee.config.validation import validated
from megatron_ee.errors import ConfigError
from megatron_ee.inference.certificate import Decoding
from megatron_ee.inference.requests import Request
from megatron_ee.inference.sampling import MAX_SEED, Sampling
from megatron_ee.serving.api.early_exit import controls_of, early_exit_fields
from megatron_ee.serving.api.prompts import ModelFacts, Prompt, completion_prompt, conversation_prompt
from megatron_ee.serving.api.request_bodies import ChatCompletionRequest, CompletionRequest, EarlyExitFields
from megatron_ee.serving.rules.rules import Controls

DEFAULT_COMPLETION_TOKENS = 16
"""Default of ``max_tokens`` in ``/v1/completions``, as OpenAI's, where ``RequestLimits`` allow as many."""
MAX_STOP = 16
"""Stop strings of a request, and stop tokens. OpenAI's limit is 4."""
MAX_STOP_LENGTH = 256
"""Characters of a stop string."""


@dataclass(frozen=True)
class RequestLimits:
    """What one HTTP request may ask for.

    Attributes:
        max_body: bytes of a body.
        max_prompt_tokens: of one prompt; None for what the model's positions allow.
        max_tokens: of one answer. It is also the default of chats, as far as positions are left.
        max_outputs: answers of one HTTP request: prompts x ``n``.
        deadline: seconds from arrival until an unfinished request ends with an error; None for no end.
        default_temperature: of requests that do not give one; OpenAI's is 1.
    """

    max_body: int = 8 * 2**20
    max_prompt_tokens: int | None = None
    max_tokens: int = 4096
    max_outputs: int = 128
    deadline: float | None = None
    default_temperature: float = 1.0


@dataclass(frozen=True)
class Context:
    """What translation needs besides the body.

    Attributes:
        facts: of the model.
        limits: on the request.
        priority: the header ``X-Priority``.
        decoding_of: gives the settings that the certificate of a request's task was made with, for what the request
            leaves out; None without a certificate.
        budget: tokens that the client may use in a minute; a chat that does not say how many it wants fits in it. None
            for any number.
    """

    facts: ModelFacts
    limits: RequestLimits
    priority: str | None
    decoding_of: Callable[[Controls], Decoding | None]
    budget: int | None = None


@dataclass(frozen=True)
class Generation:
    """What one HTTP request asks for.

    Attributes:
        chat: whether it is a conversation.
        prompts: at least one.
        requests: one for each prompt, before the server's rules are applied.
        controls: what it says of early exit.
        max_tokens: maximum number of tokens of an answer; 0 to return only the prompt.
        echo: whether answers start with their prompts.
        logprobs: number of most probable tokens to list besides each token; None for no log-probabilities.
        stream: whether to answer with server-sent events.
        include_usage: whether the stream ends with the usage.
        tokens_as_ids: name tokens in log-probabilities as ``token_id:NUMBER``.
        policy_field: field of ``early_exit`` that its exit policy comes from, for errors.
    """

    chat: bool
    prompts: tuple[Prompt, ...]
    requests: tuple[Request, ...]
    controls: Controls
    max_tokens: int
    echo: bool = False
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    tokens_as_ids: bool = False
    policy_field: str = "policy"

    @property
    def samples(self) -> int:
        """Number of answers per prompt."""
        return self.requests[0].samples

    @property
    def scores_prompts(self) -> bool:
        """Whether log-probabilities of the prompts' tokens are wanted."""
        return self.echo and self.logprobs is not None

    @property
    def most_tokens(self) -> int:
        """The most tokens that it can take, prompts included."""
        return sum(len(prompt.ids) for prompt in self.prompts) + len(self.prompts) * self.samples * self.max_tokens


_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
_EXITS = ("mode", "policy", "exits", "task", "draft", "uncertified", "group")
_NAMES = {
    "samples": "n",
    "stop_ids": "stop_token_ids",
    **{f"sampling.{name}": name for name in (*_SAMPLING, "seed")},
    **{name: f"early_exit.{name}" for name in _EXITS},
}
"""Names of the engine's settings, and the fields of a body that they come from."""


def renamed(error: ConfigError, policy: str = "policy") -> ConfigError:
    """An error of the engine or the rules with the body's name of the field that its message starts with.

    Args:
        error: about a setting of the engine.
        policy: field of ``early_exit`` that the exit policy comes from.
    """
    message = str(error)
    name, colon, rest = message.partition(":")
    if colon and name == "policy":
        return ConfigError(f"early_exit.{policy}:{rest}")
    for own, given in _NAMES.items():
        if colon and (name == own or name.startswith((f"{own}.", f"{own}["))):
            return ConfigError(f"{given}{name[len(own) :]}:{rest}")
    return error


def completion_generation(body: CompletionRequest, context: Context) -> Generation:
    """Translate the body of ``/v1/completions``.

    Raises:
        ConfigError: the message names the field.
    """
    limits = context.limits
    given = _each(body.prompt)
    if len(given) > limits.max_outputs:
        raise ConfigError(f"prompt: {len(given)} prompts are too many; there may be {limits.max_outputs}")
    if body.max_tokens == 0 and not body.echo:
        raise ConfigError("max_tokens: 0 only with echo, which returns the prompt; ask for at least 1 token")
    settings = _settings(body, context)
    prompts = tuple(completion_prompt(each, context.facts) for each in given)
    _check_lengths(prompts, "prompt", limits)
    decoding = settings.decoding
    wanted = min(DEFAULT_COMPLETION_TOKENS if decoding is None else decoding.max_tokens, limits.max_tokens)
    return _generation(
        body,
        prompts,
        limits,
        settings,
        max_tokens=wanted if body.max_tokens is None else body.max_tokens,
        echo=bool(body.echo),
        logprobs=body.logprobs,
    )


def chat_generation(body: ChatCompletionRequest, context: Context) -> Generation:
    """Translate the body of ``/v1/chat/completions``.

    Raises:
        ConfigError: the message names the field.
    """
    facts, limits, budget = context.facts, context.limits, context.budget
    settings = _settings(body, context)
    prompt = conversation_prompt(body.messages, facts)
    _check_lengths((prompt,), "messages", limits)
    given = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    room = max(1, facts.max_positions - len(prompt.ids))
    wanted = room if settings.decoding is None else settings.decoding.max_tokens
    if budget is not None:
        wanted = max(1, min(wanted, (budget - len(prompt.ids)) // (body.n or 1)))
    return _generation(
        body,
        (prompt,),
        limits,
        settings,
        chat=True,
        max_tokens=min(limits.max_tokens, wanted) if given is None else given,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


@dataclass(frozen=True)
class _RequestSettings:
    """What does not depend on the prompt: what it says of early exit, and the settings for what it leaves out."""

    fields: EarlyExitFields
    controls: Controls
    decoding: Decoding | None


def _settings(body: CompletionRequest | ChatCompletionRequest, context: Context) -> _RequestSettings:
    fields = early_exit_fields(body)
    controls = controls_of(fields, body.priority, context.priority)
    try:
        return _RequestSettings(fields, controls, context.decoding_of(controls))
    except ConfigError as error:
        raise renamed(error) from None


def _generation(
    body: CompletionRequest | ChatCompletionRequest,
    prompts: tuple[Prompt, ...],
    limits: RequestLimits,
    settings: _RequestSettings,
    *,
    chat: bool = False,
    max_tokens: int,
    echo: bool = False,
    logprobs: int | None,
) -> Generation:
    fields, decoding = settings.fields, settings.decoding
    samples = 1 if body.n is None else body.n
    if max_tokens > limits.max_tokens:
        name = "max_completion_tokens" if chat and body.max_tokens is None else "max_tokens"
        raise ConfigError(f"{name}: must be at most {limits.max_tokens}, not {max_tokens}")
    if samples * len(prompts) > limits.max_outputs:
        raise ConfigError(
            f"n: {samples} answers to each of {len(prompts)} prompts are too many; there may be {limits.max_outputs}"
        )
    ignore_eos = decoding is not None and decoding.ignore_eos
    common = {
        "samples": samples,
        "max_tokens": max(max_tokens, 1),
        "stop": _stop(body, decoding),
        "stop_ids": tuple(_few(body.stop_token_ids or [], "stop_token_ids")),
        "ignore_eos": ignore_eos if body.ignore_eos is None else body.ignore_eos,
        "logprobs": logprobs,
    }
    requests = []
    for prompt in prompts:
        try:
            sampling = _sampling(body, limits, decoding, samples)
            requests.append(validated(Request, {"prompt": prompt.ids, "sampling": sampling, **common}))
        except ConfigError as error:
            raise renamed(error) from None
    return Generation(
        chat=chat,
        prompts=prompts,
        requests=tuple(requests),
        controls=settings.controls,
        max_tokens=max_tokens,
        echo=echo,
        logprobs=logprobs,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options is not None and body.stream_options.include_usage),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        policy_field="policy" if fields.policy is not None else "threshold",
    )


def _sampling(
    body: CompletionRequest | ChatCompletionRequest, limits: RequestLimits, decoding: Decoding | None, samples: int
) -> Sampling:
    values = {"temperature": limits.default_temperature} if decoding is None else decoding.sampling.model_dump()
    for name in _SAMPLING:
        given = getattr(body, name)
        if given is not None:
            values[name] = max(given, 0) if name == "top_k" else given
    seed = secrets.randbits(62) if body.seed is None else body.seed
    # OpenAI's seeds may be negative. Sample i has seed + i, which must stay below the largest seed.
    values["seed"] = seed % (MAX_SEED - samples + 2)
    return validated(Sampling, values)


def _stop(body: CompletionRequest | ChatCompletionRequest, decoding: Decoding | None) -> tuple[str, ...]:
    if body.stop is None:
        return () if decoding is None else decoding.stop
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    for text in _few(stop, "stop"):
        if len(text) > MAX_STOP_LENGTH:
            raise ConfigError(f"stop: a string of {len(text)} characters is too long; at most {MAX_STOP_LENGTH}")
    return tuple(text for text in stop if text)  # clients send an empty string for none


def _few(values: list[Any], name: str) -> list[Any]:
    if len(values) > MAX_STOP:
        raise ConfigError(f"{name}: {len(values)} are too many; give at most {MAX_STOP}")
    return values


def _each(prompt: str | Sequence[Any]) -> list[str | Sequence[int]]:
    """The prompts: texts, or lists of token ids."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _check_lengths(prompts: Sequence[Prompt], name: str, limits: RequestLimits) -> None:
    for prompt in prompts:
        if limits.max_prompt_tokens is not None and len(prompt.ids) > limits.max_prompt_tokens:
            raise ConfigError(f"{name}: has {len(prompt.ids)} tokens; at most {limits.max_prompt_tokens} are accepted")
