"""Requests, which come from people and files, and what the engine gives for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megatron_ee.config.validation import Strict
from megatron_ee.data.chat import render_chat
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import ConfigError, DataError, shown
from megatron_ee.inference.heads import LogProbs
from megatron_ee.inference.policy import AnyPolicy, ThresholdPolicy
from megatron_ee.inference.sampling import MAX_SEED, Sampling

Mode = Literal["full", "threshold", "speculative"]
MAX_DRAFT = 16
MAX_LOGPROBS = 100
FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]


class Draft(Strict):
    """How speculative mode drafts.

    Attributes:
        exit: layer of the drafting exit; None chooses online.
        length: proposals before the full model verifies; None chooses online, down to none where drafting does not
            pay.
    """

    exit: int | None = None
    length: int | None = Field(default=None, ge=0, le=MAX_DRAFT)


Ids = Annotated[tuple[int, ...], Field(strict=False)]
"""Whole numbers, in a list or a tuple."""


class Request(Strict):
    """One prompt to continue.

    Attributes:
        prompt: text, or token ids, special tokens included.
        mode: ``full``: every token runs all layers; ``threshold``: a token leaves at the first exit where the policy
            lets it; ``speculative``: an exit drafts and the full model verifies, with the full model's output.
        policy: of threshold mode.
        draft: of speculative mode.
        exits: layers of the exits that may be asked; None for all.
        sampling: how tokens are chosen; sample ``i`` of several has seed ``seed + i``.
        samples: outputs for this prompt; all but the first share its prompt's keys and values.
        max_tokens: largest number of tokens to emit.
        stop: texts that end the output; they are not part of it.
        stop_ids: tokens that end it, beside the model's own end of text.
        ignore_eos: go on after the end of text.
        echo: begin the output's text with the prompt.
        logprobs: number of the most probable tokens to give with their log-probabilities, beside the emitted one's;
            None for none.
        forced_ids: token ids that the output goes on with, whatever it emits (teacher forcing): this shows what a mode
            emits at each position of a given text. Not in mode ``speculative``. At most so many tokens are emitted.
    """

    prompt: str | Ids
    mode: Mode = "full"
    policy: AnyPolicy = ThresholdPolicy()
    draft: Draft = Draft()
    exits: Ids | None = None
    sampling: Sampling = Sampling()
    samples: int = Field(default=1, ge=1, le=128)
    max_tokens: int = Field(default=64, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), strict=False)
    stop_ids: Ids = ()
    ignore_eos: bool = False
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    forced_ids: Ids = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.sampling.seed + self.samples - 1 > MAX_SEED:
            raise ValueError(f"seed: must leave room for {self.samples} samples up to {MAX_SEED}")
        if self.forced_ids and self.mode == "speculative":
            raise ValueError("forced_ids: proposals cannot be verified on a text that is given; use another mode")
        return self

    def check(self, exits: Sequence[int], num_layers: int, off: Sequence[int] = ()) -> None:
        """Check what depends on the model, but for the prompt.

        Args:
            exits: layers of the exits that there are.
            num_layers: depth of the model.
            off: layers of the exits that are switched off.

        Raises:
            ConfigError: naming the field.
        """
        if self.mode != "full" and not exits:
            what = f"those after layers {_listed(off)} are switched off" if off else "give their adapter"
            raise ConfigError(f"mode: {self.mode} needs exits; {what}")
        # A mode that asks no exit may name one that is switched off.
        exits, off = ([*exits, *off], ()) if self.mode == "full" else (exits, off)
        for name, wanted in (("exits", self.exits or ()), ("thresholds", self.policy.named_exits())):
            for layer in wanted:
                _known(name, layer, exits, off)
        if self.exits is not None and not self.exits and self.mode != "full":
            raise ConfigError(f"exits: mode {self.mode} needs at least one")
        self._check_draft(exits, num_layers, off)

    def _check_draft(self, exits: Sequence[int], num_layers: int, off: Sequence[int]) -> None:
        """Refuse in every mode what could never work, also where the mode makes no use of it."""
        enabled = exits if self.exits is None else self.exits
        drafting = [layer for layer in enabled if layer < num_layers]
        if self.draft.exit is not None:
            if self.draft.exit == num_layers and num_layers in exits:
                raise ConfigError(
                    f"draft.exit: the exit after layer {num_layers} reads the last layer, so that its drafts would "
                    f"save nothing; exits that can draft: {_listed(drafting)}"
                )
            _known("draft.exit", self.draft.exit, drafting, off)
        elif self.mode == "speculative" and not drafting:
            raise ConfigError("exits: none before the last layer is enabled, so that nothing can draft")


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
        layer: the layer whose exit emitted it, the last for the final exit; in speculative mode the drafting exit's
            where its proposal was accepted.
        confidence: of the head that emitted it, or in speculative mode of the final exit; in the policy's measure.
        logprobs: where asked for.
    """

    id: int
    layer: int
    confidence: float
    logprobs: LogProbs | None = None


@dataclass(frozen=True)
class Completion:
    """One finished output.

    Attributes:
        text: it goes on where the prompt ends (or begins with it, with ``echo``), without end of text or stop text.
        tokens: emitted, the one that ended it included.
        pieces: the text that each token adds.
        finish_reason: ``eos``, ``stop``, ``length`` (``max_tokens``), ``context`` (the model's positions),
            ``cancelled``.
        statistics: see ``OutputState.statistics``.
    """

    text: str
    tokens: tuple[Token, ...]
    pieces: tuple[str, ...]
    finish_reason: FinishReason
    statistics: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """What a step of the engine brought for one output.

    Attributes:
        request: number that ``submit`` gave.
        sample: which of its outputs.
        text: that became certain; not for every token there is some.
        tokens: emitted in this step.
        completion: where the output has ended.
        error: why it failed, in one line; nothing more comes.
    """

    request: int
    sample: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    completion: Completion | None = None
    error: str | None = None


def prompt_ids(request: Request, tokenizer: Tokenizer | None, vocab_size: int, max_positions: int) -> tuple[int, ...]:
    """A request's prompt as token ids.

    Raises:
        ConfigError: it is empty, no text, longer than the model's context, or has ids beyond the vocabulary.
    """
    if isinstance(request.prompt, str):
        if tokenizer is None:
            raise ConfigError("prompt: is text, but there is no tokenizer; give token ids")
        _check_text(request.prompt)
        prompt = tuple(tokenizer.encode_prompt(request.prompt)) if request.prompt else ()
    else:
        prompt = request.prompt
    if not prompt:
        raise ConfigError("prompt: is empty; give text to continue")
    if tokenizer is not None:
        _check_known(tokenizer, prompt, vocab_size)
    check_ids("prompt", prompt, vocab_size)
    if len(prompt) >= max_positions:
        raise ConfigError(f"prompt: has {len(prompt)} tokens, but the model has {max_positions} positions; shorten it")
    return prompt


def _check_text(text: str) -> None:
    """Refuse half a surrogate pair, on which tokenizers fail. JSON can spell one, and bytes of the command line that
    are not UTF-8 become one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt: is no text that can be encoded: character {error.start}: {error.reason}") from None


def _check_known(tokenizer: Tokenizer, prompt: Sequence[int], vocab_size: int) -> None:
    """Name a token of the tokenizer that the model has no embedding for; other ids are ``check_ids``'s business."""
    wrong = tokenizer.unknown_token([token for token in prompt if token < tokenizer.vocab_size], vocab_size)
    if wrong is not None:
        raise ConfigError(f"prompt: {wrong}; leave it out of the text and the chat template")


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise a ``ConfigError`` that names the field where one is no token of the model."""
    if not all(0 <= token < vocab_size for token in ids):
        raise ConfigError(f"{name}: token ids must be whole numbers from 0 to {vocab_size - 1}")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation in the model's own chat template, up to where the assistant's turn begins.

    Raises:
        DataError: there is no template, or it fails on these messages.
        ConfigError: the rendered conversation is no text that can be encoded.
    """
    if not tokenizer.templates:
        raise DataError(f"{tokenizer.path}: the tokenizer has no chat template; give the prompt as text")
    try:
        text, _ = render_chat(tokenizer, messages, prompt=True)
    except Exception as error:  # a template is a program: it may fail in any way
        raise DataError(f"{tokenizer.path}: the chat template fails on these messages: {error}") from None
    _check_text(text)
    return tokenizer.encode_spans(text)[0]
