"""From the body of an HTTP request to requests of the engine. Nothing here waits or changes state."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ee.config.validation import validated
from megatron_ee.data.chat import render_chat
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import ConfigError, DataError, UserError, first_line, shown
from megatron_ee.inference.certificate import Decoding
from megatron_ee.inference.policy import ExitPolicy, policy_from_json
from megatron_ee.inference.requests import Draft, Request, check_length, check_text, prompt_ids
from megatron_ee.inference.sampling import MAX_SEED, Sampling
from megatron_ee.serving.protocol import ChatBody, CompletionBody, EarlyExitFields, PromptMessage
from megatron_ee.serving.rules import Controls

IMPORTANT = "important"
PRIORITIES = ("default", IMPORTANT)
TEXT_TOKENS = 16
"""Default of ``max_tokens`` in ``/v1/completions``, as OpenAI's."""


@dataclass(frozen=True)
class RequestLimits:
    """What one HTTP request may ask for.

    Attributes:
        max_body: bytes of a body.
        max_prompt_tokens: of one prompt; None for what the model's positions allow.
        max_tokens: of one answer. It is also the default of chats, as far as positions are left.
        max_outputs: answers of one HTTP request: prompts x ``n``.
        max_stop: stop strings, and stop tokens.
        max_stop_length: characters of a stop string.
        deadline: seconds from admission until an unfinished request ends with an error; None for no end.
        default_temperature: of requests that do not give one; OpenAI's is 1.
    """

    max_body: int = 8 * 2**20
    max_prompt_tokens: int | None = None
    max_tokens: int = 4096
    max_outputs: int = 128
    max_stop: int = 16
    max_stop_length: int = 256
    deadline: float | None = None
    default_temperature: float = 1.0


@dataclass(frozen=True)
class ModelFacts:
    """What translation needs of the model.

    Attributes:
        tokenizer: of the model.
        vocab_size: of the model.
        max_positions: of a sequence.
    """

    tokenizer: Tokenizer
    vocab_size: int
    max_positions: int


@dataclass(frozen=True)
class Prompt:
    """One prompt: its token ids, and its text as the client gave it (decoded, if it gave ids)."""

    ids: tuple[int, ...]
    text: str


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


Defaults = Callable[[Controls], Decoding | None]
"""Gives the settings that the certificate of a request's task was made with, for what the request leaves out."""
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


def renamed(message: str, policy: str = "policy") -> str:
    """An error message of the engine or the rules with the body's name of the field that it starts with.

    Args:
        message: of the error.
        policy: field of ``early_exit`` that the exit policy comes from.
    """
    name, colon, rest = message.partition(":")
    if colon and name == "policy":
        return f"early_exit.{policy}:{rest}"
    for own, given in _NAMES.items():
        if colon and (name == own or name.startswith((f"{own}.", f"{own}["))):
            return f"{given}{name[len(own) :]}:{rest}"
    return message


def no_defaults(controls: Controls) -> Decoding | None:
    """``Defaults`` without certificates."""
    return None


def completion_generation(
    body: CompletionBody,
    facts: ModelFacts,
    limits: RequestLimits,
    priority: str | None = None,
    defaults: Defaults = no_defaults,
) -> Generation:
    """Translate the body of ``/v1/completions``.

    Args:
        body: of the request.
        facts: of the model.
        limits: on the request.
        priority: the header ``X-Priority``.
        defaults: see there.

    Raises:
        ConfigError: the message names the field.
    """
    given = _each(body.prompt)
    if len(given) > limits.max_outputs:
        raise ConfigError(f"prompt: {len(given)} prompts are too many; there may be {limits.max_outputs}")
    if body.max_tokens == 0 and not body.echo:
        raise ConfigError("max_tokens: 0 only with echo, which returns the prompt; ask for at least 1 token")
    common = _common(body, limits, priority, defaults)
    prompts = tuple(_prompt(each, facts) for each in given)
    _check_lengths(prompts, "prompt", limits)
    wanted = TEXT_TOKENS if common.decoding is None else min(common.decoding.max_tokens, limits.max_tokens)
    return _generation(
        body,
        prompts,
        limits,
        common,
        max_tokens=wanted if body.max_tokens is None else body.max_tokens,
        echo=bool(body.echo),
        logprobs=body.logprobs,
    )


def chat_generation(
    body: ChatBody,
    facts: ModelFacts,
    limits: RequestLimits,
    priority: str | None = None,
    defaults: Defaults = no_defaults,
    budget: int | None = None,
) -> Generation:
    """Translate the body of ``/v1/chat/completions``.

    Args:
        body: of the request; the next arguments and the errors are as for ``completion_generation``.
        facts: of the model.
        limits: on the request.
        priority: the header ``X-Priority``.
        defaults: see there.
        budget: tokens that the client may use in a minute; a request that does not say how many it wants fits in it.
            None for any number.
    """
    common = _common(body, limits, priority, defaults)
    prompt = chat_prompt(body.messages, facts)
    _check_lengths((prompt,), "messages", limits)
    given = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    room = max(1, facts.max_positions - len(prompt.ids))
    wanted = room if common.decoding is None else common.decoding.max_tokens
    if budget is not None:
        wanted = max(1, min(wanted, (budget - len(prompt.ids)) // (body.n or 1)))
    return _generation(
        body,
        (prompt,),
        limits,
        common,
        chat=True,
        max_tokens=min(limits.max_tokens, wanted) if given is None else given,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def chat_prompt(messages: Sequence[PromptMessage], facts: ModelFacts) -> Prompt:
    """The prompt of a conversation, in the model's chat template.

    Raises:
        ConfigError: the model has no template, it fails on these messages, or the prompt is too long.
    """
    plain = [_plain(message) for message in messages]
    if not facts.tokenizer.templates:
        raise ConfigError("messages: the model has no chat template; use /v1/completions")
    try:
        text, _ = render_chat(facts.tokenizer, plain, prompt=True)
    except Exception as error:  # a template is a program and may raise any exception
        raise ConfigError(f"messages: the chat template fails on them: {first_line(error)}") from None
    try:
        check_text(text)
        check_length(facts.tokenizer, text, facts.max_positions)
        ids = tuple(facts.tokenizer.encode_spans(text)[0])
        prompt_ids(Request(prompt=ids), facts.tokenizer, facts.vocab_size, facts.max_positions)
    except UserError as error:
        raise ConfigError(_of_messages(error)) from None
    return Prompt(ids, text)


def controls_of(given: EarlyExitFields, body: CompletionBody | ChatBody, priority: str | None = None) -> Controls:
    """What a request says of early exit.

    Args:
        given: from the body.
        body: of the request.
        priority: the header ``X-Priority``.

    Raises:
        ConfigError: the message names the field, or the header.
    """
    header = (priority or "default").strip().lower()
    if header not in PRIORITIES:
        raise ConfigError(f"X-Priority: must be one of {', '.join(PRIORITIES)}, not {shown(priority)}")
    mode = given.mode
    if mode is None and given.draft is not None:
        mode = "speculative"
    return Controls(
        mode=mode,
        policy=_policy(given),
        exits=None if given.exits is None else tuple(given.exits),
        task=given.task,
        important=IMPORTANT in (body.priority, header),
        uncertified=bool(given.uncertified),
        group=given.group,
    )


@dataclass(frozen=True)
class _Common:
    """What does not depend on the prompt: what it says of early exit, and the settings for what it leaves out."""

    given: EarlyExitFields
    controls: Controls
    decoding: Decoding | None


def _common(
    body: CompletionBody | ChatBody, limits: RequestLimits, priority: str | None, defaults: Defaults
) -> _Common:
    given = early_exit_of(body)
    controls = controls_of(given, body, priority)
    try:
        return _Common(given, controls, defaults(controls))
    except ConfigError as error:
        raise ConfigError(renamed(str(error))) from None


def _generation(
    body: CompletionBody | ChatBody,
    prompts: tuple[Prompt, ...],
    limits: RequestLimits,
    common: _Common,
    *,
    chat: bool = False,
    max_tokens: int,
    echo: bool = False,
    logprobs: int | None,
) -> Generation:
    samples = 1 if body.n is None else body.n
    if max_tokens > limits.max_tokens:
        name = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
        raise ConfigError(f"{name}: must be at most {limits.max_tokens}, not {max_tokens}")
    if samples * len(prompts) > limits.max_outputs:
        raise ConfigError(
            f"n: {samples} answers to each of {len(prompts)} prompts are too many; there may be {limits.max_outputs}"
        )
    ignore_eos = common.decoding is not None and common.decoding.ignore_eos
    fields = {
        "draft": common.given.draft or Draft(),
        "samples": samples,
        "max_tokens": max(max_tokens, 1),
        "stop": _stop(body, limits, common.decoding),
        "stop_ids": tuple(_few(body.stop_token_ids or [], "stop_token_ids", limits)),
        "ignore_eos": ignore_eos if body.ignore_eos is None else body.ignore_eos,
        "logprobs": logprobs,
    }
    requests = []
    for prompt in prompts:
        try:
            sampling = _sampling(body, limits, common.decoding, samples)
            requests.append(validated(Request, {"prompt": prompt.ids, "sampling": sampling, **fields}))
        except ConfigError as error:
            raise ConfigError(renamed(str(error))) from None
    return Generation(
        chat=chat,
        prompts=prompts,
        requests=tuple(requests),
        controls=common.controls,
        max_tokens=max_tokens,
        echo=echo,
        logprobs=logprobs,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options is not None and body.stream_options.include_usage),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        policy_field="policy" if common.given.policy is not None else "threshold",
    )


def _sampling(
    body: CompletionBody | ChatBody, limits: RequestLimits, decoding: Decoding | None, samples: int
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


def _stop(body: CompletionBody | ChatBody, limits: RequestLimits, decoding: Decoding | None) -> tuple[str, ...]:
    if body.stop is None:
        return () if decoding is None else decoding.stop
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    for text in _few(stop, "stop", limits):
        if len(text) > limits.max_stop_length:
            raise ConfigError(f"stop: a string of {len(text)} characters is too long; at most {limits.max_stop_length}")
    return tuple(text for text in stop if text)  # clients send an empty string for none


def _few(values: list[Any], name: str, limits: RequestLimits) -> list[Any]:
    if len(values) > limits.max_stop:
        raise ConfigError(f"{name}: {len(values)} are too many; give at most {limits.max_stop}")
    return values


def _each(prompt: str | Sequence[Any]) -> list[str | Sequence[int]]:
    """The prompts: texts, or lists of token ids."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _prompt(given: str | Sequence[int], facts: ModelFacts) -> Prompt:
    content = given if isinstance(given, str) else tuple(given)
    ids = prompt_ids(Request(prompt=content), facts.tokenizer, facts.vocab_size, facts.max_positions)
    return Prompt(ids, given if isinstance(given, str) else facts.tokenizer.decode(ids))


def _check_lengths(prompts: Sequence[Prompt], name: str, limits: RequestLimits) -> None:
    for prompt in prompts:
        if limits.max_prompt_tokens is not None and len(prompt.ids) > limits.max_prompt_tokens:
            raise ConfigError(f"{name}: has {len(prompt.ids)} tokens; at most {limits.max_prompt_tokens} are accepted")


def _plain(message: PromptMessage) -> dict[str, str]:
    """A message as chat templates read it. Templates know ``system``, not OpenAI's newer ``developer``."""
    content = message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
    plain = {"role": "system" if message.role == "developer" else message.role, "content": content}
    return plain if message.name is None else {**plain, "name": message.name}


def _of_messages(error: Exception) -> str:
    name, colon, rest = str(error).partition(":")
    return f"messages:{rest}" if colon and name == "prompt" else str(error)


def early_exit_of(body: CompletionBody | ChatBody) -> EarlyExitFields:
    """The fields of ``early_exit`` and ``vllm_xargs`` together.

    Raises:
        ConfigError: one is invalid, or they contradict each other.
    """
    own = body.early_exit or EarlyExitFields()
    try:
        other = validated(EarlyExitFields, _from_xargs(body.vllm_xargs or {}))
    except ConfigError as error:
        raise ConfigError(f"vllm_xargs.{error}") from None
    merged = own.model_dump(exclude_none=True)
    for name, value in other.model_dump(exclude_none=True).items():
        if name in merged and merged[name] != value:
            raise ConfigError(f"vllm_xargs.{name}: differs from early_exit.{name}; give only one of them")
        merged[name] = value
    return validated(EarlyExitFields, merged)


def _from_xargs(given: Mapping[str, Any]) -> dict[str, Any]:
    """``vllm_xargs`` as ``early_exit``. Its values are flat, and clients may send numbers and lists as text."""
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("draft_exit", "draft_length"):
            fields.setdefault("draft", {})[name.removeprefix("draft_")] = _number(value, int)
        elif name == "threshold":
            fields[name] = _number(value, float)
        elif name == "exits":
            parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
            fields[name] = [_number(part, int) for part in parts]
        elif name == "policy" and isinstance(value, str) and value.lstrip().startswith("{"):
            fields[name] = _json(value)
        elif name == "uncertified" and value in ("true", "false", 1, 0):
            fields[name] = value in ("true", 1)
        else:
            fields[name] = value
    return fields


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    """A number from its text; any other value as it is, for validation to refuse."""
    try:
        return kind(value) if isinstance(value, str) and len(value) < 40 else value
    except ValueError:
        return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _policy(given: EarlyExitFields) -> ExitPolicy | None:
    """The exit policy that the body asks for; None if it asks for none."""
    form = {"name": given.policy} if isinstance(given.policy, str) else given.policy
    if given.threshold is not None:
        if form is not None and "threshold" in form:
            raise ConfigError("early_exit.threshold: policy has a threshold too; give only one of them")
        form = {**(form or {}), "threshold": given.threshold}
    if form is None:
        return None
    try:
        return policy_from_json(form)
    except (ConfigError, DataError) as error:
        raise ConfigError(f"early_exit.policy.{error}") from None
