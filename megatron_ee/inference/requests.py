"""Requests and their results: tokens, events and completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from megatron_ee.config.validation import Strict
from megatron_ee.data.chat import render_chat
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import ConfigError, DataError, shown
from megatron_ee.inference.heads import LogProbs
from megatron_ee.inference.policy import AnyPolicy, ThresholdPolicy
from megatron_ee.inference.replay import ExitReplay
from megatron_ee.inference.sampling import MAX_SEED, Sampling

Mode = Literal["full", "threshold", "speculative"]
MAX_DRAFT = 16
MAX_LOGPROBS = 100
QUICK_CHARACTERS = 16
"""Texts of at most so many characters per position of the model are tokenized to count their tokens."""
FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]


class Draft(Strict):
    """Draft settings of speculative mode.

    Attributes:
        exit: layer of the drafting exit; None to choose it online.
        length: number of proposals per round; None to choose it online. It is then 0 if drafting would be slower.
    """

    exit: int | None = None
    length: int | None = Field(default=None, ge=0, le=MAX_DRAFT)


class Coverage(Strict):
    """Whether a certificate covers an answer, see ``inference.certificate``.

    Attributes:
        status: ``certified``: tokens left early, under the certificate; ``full``: it is full mode's answer;
            ``uncertified``: tokens left early outside the certificate's settings, as the request allowed.
        task: of the certificate.
        certificate: SHA-256 of its file.
        reason: why the answer is not certified; None if it is.
    """

    status: Literal["certified", "full", "uncertified"]
    task: str
    certificate: str
    reason: str | None = None


Ids = Annotated[tuple[int, ...], Field(strict=False)]
"""A list or tuple of integers."""


def _each_once(layers: tuple[int, ...]) -> tuple[int, ...]:
    for layer, count in Counter(layers).items():
        if count > 1:
            raise ValueError(f"names layer {layer} twice")
    return layers


Layers = Annotated[Ids, AfterValidator(_each_once)]
"""Layers of exits."""


class Request(Strict):
    """One prompt to continue.

    Attributes:
        prompt: text, or token ids including special tokens.
        mode: ``full``: every token runs all layers; ``threshold``: a token leaves at the first exit where the policy
            lets it leave; ``speculative``: an exit drafts and the full model verifies; the output equals full mode's.
        policy: exit policy of threshold mode.
        draft: draft settings of speculative mode.
        exits: layers of the exits to use; None for all.
        sampling: sampling settings; output ``i`` has seed ``seed + i``.
        samples: number of outputs. They share the KV of the prompt.
        max_tokens: maximum number of tokens to emit.
        stop: strings that end the output; they are not part of it.
        stop_ids: token ids that end the output, in addition to the model's end-of-text tokens.
        ignore_eos: do not end at an end-of-text token.
        echo: start the output's text with the prompt.
        logprobs: number of most probable tokens whose log-probabilities are returned besides the emitted token's, and
            the forced token's if there is one; None for no log-probabilities. With ``replay_ids``, also in the replay.
        forced_ids: token ids that continue the sequence in place of the emitted ones (teacher forcing). So the emitted
            tokens show what a mode predicts at each position of a given text. At most this many tokens are emitted.
            Not in speculative mode.
        replay_ids: token ids that follow the prompt, such as an earlier answer. They run with it in one pass, and the
            completion says what the exits of ``exits`` and the final exit would have said in the place of each. The
            one token that is emitted is the final exit's in the last place. One sample in full mode.
        coverage: what a certificate says of the answer; None without one. It has no effect on the answer, whose
            statistics repeat it.
    """

    prompt: str | Ids
    mode: Mode = "full"
    policy: AnyPolicy = ThresholdPolicy()
    draft: Draft = Draft()
    exits: Layers | None = None
    sampling: Sampling = Sampling()
    samples: int = Field(default=1, ge=1, le=128)
    max_tokens: int = Field(default=64, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), strict=False)
    stop_ids: Ids = ()
    ignore_eos: bool = False
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    forced_ids: Ids = ()
    replay_ids: Ids = ()
    coverage: Coverage | None = None

    if not TYPE_CHECKING:  # type checkers keep the fields' own types

        def __init__(self, prompt: str | Sequence[int] | None = None, /, **fields: Any) -> None:
            """Make a request of its fields, all by name, or the prompt by position."""
            super().__init__(**fields) if prompt is None else super().__init__(prompt=prompt, **fields)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.sampling.seed + self.samples - 1 > MAX_SEED:
            raise ValueError(
                f"sampling.seed: sample i of several has seed + i, which may be at most {MAX_SEED}; give a smaller seed"
            )
        if self.forced_ids and self.mode == "speculative":
            raise ValueError("forced_ids: speculative mode cannot verify proposals on a forced text; use another mode")
        if self.replay_ids and (self.mode != "full" or self.samples > 1 or self.forced_ids):
            raise ValueError("replay_ids: needs mode full, one sample, and no forced_ids")
        return self

    @property
    def scores_text(self) -> bool:
        """Whether a text is given. Its last token is only scored: it runs no layer, so it needs no position."""
        return bool(self.forced_ids or self.replay_ids)

    def check(
        self, exits: Sequence[int], num_layers: int, off: Sequence[int] = (), gates: Collection[int] = ()
    ) -> None:
        """Check the settings that depend on the model, except the prompt.

        Args:
            exits: layers of the available exits.
            num_layers: number of backbone layers.
            off: layers of the exits that are switched off.
            gates: layers of the exits that have a gate.

        Raises:
            ConfigError: a setting is invalid; the message names the field.
        """
        if self.mode != "full" and not exits:
            what = f"those after layers {_listed(off)} are switched off" if off else "give their adapter"
            raise ConfigError(f"mode: {self.mode} needs exits; {what}")
        # Full mode asks no exits, so it may name one that is switched off.
        exits, off = ([*exits, *off], ()) if self.mode == "full" else (exits, off)
        named = {f"policy.{field}": layers for field, layers in self.policy.named_exits().items()}
        for name, wanted in {"exits": self.exits or (), **named}.items():
            for layer in wanted:
                _known(name, layer, exits, off)
        if self.exits is not None and not self.exits and self.mode != "full":
            raise ConfigError(f"exits: mode {self.mode} needs at least one")
        if self.mode == "threshold" and self.policy.gated:
            for layer in exits if self.exits is None else self.exits:
                if layer not in gates:
                    others = f", or use only exits that have one: {_listed(sorted(gates))}" if gates else ""
                    raise ConfigError(
                        f"policy: the exit after layer {layer} has no gate; tune it with gate: true{others}"
                    )
        self._check_draft(exits, num_layers, off)

    def _check_draft(self, exits: Sequence[int], num_layers: int, off: Sequence[int]) -> None:
        """Check the draft settings, also in modes that do not use them."""
        enabled = exits if self.exits is None else self.exits
        drafting = [layer for layer in enabled if layer < num_layers]
        if self.draft.exit is not None:
            if self.draft.exit == num_layers and num_layers in exits:
                raise ConfigError(
                    f"draft.exit: the exit after layer {num_layers} reads the last layer, so its drafts would "
                    f"save nothing; exits that can draft: {_listed(drafting)}"
                )
            _known("draft.exit", self.draft.exit, drafting, off)
        elif self.mode == "speculative" and not drafting:
            raise ConfigError("exits: only an exit before the last layer can draft, and none is enabled")


def _known(name: str, layer: int, exits: Sequence[int], off: Sequence[int]) -> None:
    if layer in off:
        raise ConfigError(f"{name}: the exit after layer {layer} is switched off; there are: {_listed(exits)}")
    if layer not in exits:
        raise ConfigError(f"{name}: there is no exit after layer {shown(layer)}; there are: {_listed(exits)}")


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


@dataclass(frozen=True)
class Token:
    """One emitted token.

    Attributes:
        id: token id.
        layer: layer of the exit that emitted it; the last layer for the final exit. In speculative mode, the layer of
            the drafting exit for an accepted proposal.
        confidence: confidence of the head that emitted it, in the policy's measure; in speculative mode, of the final
            exit.
        logprobs: if requested.
        rejected: in speculative mode, the proposal in whose place the final exit emitted this token; None for none.
    """

    id: int
    layer: int
    confidence: float
    logprobs: LogProbs | None = None
    rejected: int | None = None


@dataclass(frozen=True)
class Completion:
    """One finished output.

    Attributes:
        text: the generated text (after the prompt, with ``echo``), without end-of-text tokens and stop strings.
        tokens: emitted tokens, including the one that ended the output.
        pieces: the text that each token added.
        finish_reason: ``eos``, ``stop``, ``length`` (``max_tokens``), ``context`` (the model's positions),
            ``cancelled``.
        statistics: see ``OutputState.statistics``.
        replay: with ``replay_ids``, what each exit says of them, by depth; the last one is the final exit.
    """

    text: str
    tokens: tuple[Token, ...]
    pieces: tuple[str, ...]
    finish_reason: FinishReason
    statistics: dict[str, Any]
    replay: tuple[ExitReplay, ...] = ()


@dataclass(frozen=True)
class Event:
    """The progress of one output in one engine step.

    Attributes:
        request: number of the request, from ``submit``.
        sample: index of the output.
        text: text that became final; it may be empty.
        tokens: tokens emitted in this step.
        pieces: the text that each of them added. What the output's end has released besides, without a token, is in
            ``text`` only.
        completion: if the output has ended.
        error: error message of one line if the output has failed; no further events follow.
    """

    request: int
    sample: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    pieces: tuple[str, ...] = ()
    completion: Completion | None = None
    error: str | None = None

    @property
    def last(self) -> bool:
        """Whether no further events follow for this output."""
        return self.completion is not None or self.error is not None


def prompt_ids(request: Request, tokenizer: Tokenizer | None, vocab_size: int, max_positions: int) -> tuple[int, ...]:
    """A request's prompt as token ids.

    Raises:
        ConfigError: it is empty, not valid Unicode, longer than the model's context, or has ids outside the vocabulary.
    """
    if isinstance(request.prompt, str):
        if tokenizer is None:
            raise ConfigError("prompt: is text, but there is no tokenizer; give token ids")
        check_text(request.prompt)
        check_length(tokenizer, request.prompt, max_positions)
        prompt = tuple(tokenizer.encode_prompt(request.prompt)) if request.prompt else ()
    else:
        prompt = request.prompt
    if not prompt:
        raise ConfigError("prompt: is empty; give text to continue")
    if tokenizer is not None:
        _check_known(tokenizer, prompt, vocab_size)
    check_ids("prompt", prompt, vocab_size)
    if len(prompt) >= max_positions + request.scores_text:
        raise _too_long(str(len(prompt)), max_positions)
    return prompt


def check_length(tokenizer: Tokenizer, text: str, max_positions: int) -> None:
    """Refuse a text that is much too long for the model, before it is tokenized, which may take minutes.

    Raises:
        ConfigError: it certainly has more tokens than the model's context.
    """
    if len(text) > QUICK_CHARACTERS * max_positions:
        least = tokenizer.least_tokens(text)
        if least >= max_positions:
            raise _too_long(f"at least {least}", max_positions)


def _too_long(tokens: str, max_positions: int) -> ConfigError:
    return ConfigError(
        f"prompt: has {tokens} tokens; the model's {max_positions} positions leave room for a new token after at most "
        f"{max_positions - 1}; shorten it"
    )


def check_text(text: str) -> None:
    """Refuse lone surrogates, on which tokenizers fail. JSON can contain them, and Python decodes command-line bytes
    that are not UTF-8 to them.

    Raises:
        ConfigError: the text has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt: is not valid Unicode: character {error.start}: {error.reason}") from None


def _check_known(tokenizer: Tokenizer, prompt: Sequence[int], vocab_size: int) -> None:
    """Refuse tokens of the tokenizer that the model has no embedding for. ``check_ids`` checks all other ids."""
    wrong = tokenizer.unknown_token([token for token in prompt if token < tokenizer.vocab_size], vocab_size)
    if wrong is not None:
        raise ConfigError(f"prompt: {wrong}; leave it out of the text and the chat template")


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise a ``ConfigError`` that names the field if an id is not in ``[0, vocab_size)``."""
    if not all(0 <= token < vocab_size for token in ids):
        raise ConfigError(f"{name}: token ids must be whole numbers from 0 to {vocab_size - 1}")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], max_positions: int | None = None
) -> list[int]:
    """Token ids of ``chat_prompt``; arguments and errors as there."""
    return tokenizer.encode_spans(chat_prompt(tokenizer, messages, max_positions))[0]


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], max_positions: int | None = None) -> str:
    """Text of a conversation in the model's chat template, up to the start of the assistant's turn.

    Args:
        tokenizer: with the template.
        messages: the conversation.
        max_positions: of the model; None for any length.

    Raises:
        DataError: there is no template, or it fails on these messages.
        ConfigError: the rendered conversation is not valid Unicode, or much too long for the model.
    """
    if not tokenizer.templates:
        raise DataError(f"{tokenizer.path}: the tokenizer has no chat template; give the prompt as text")
    try:
        text, _ = render_chat(tokenizer, messages, prompt=True)
    except Exception as error:  # a template is a program and may raise any exception
        raise DataError(f"{tokenizer.path}: the chat template fails on these messages: {error}") from None
    check_text(text)
    if max_positions is not None:
        check_length(tokenizer, text, max_positions)
    return text
