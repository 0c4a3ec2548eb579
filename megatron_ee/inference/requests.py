"""What is asked of the engine, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from megatron_ee.errors import ConfigError, shown
from megatron_ee.inference.heads import LogProbs
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.inference.sampling import MAX_SEED, Sampling

Mode = Literal["full", "threshold", "speculative"]
MAX_DRAFT = 16
MAX_LOGPROBS = 100
FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class Draft:
    """How speculative mode drafts.

    Attributes:
        exit: layer of the drafting exit; None chooses online.
        length: proposals before the full model verifies; None chooses online, down to none where drafting does not
            pay; at most ``MAX_DRAFT``.
    """

    exit: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: text, or token ids, special tokens included.
        mode: ``full``: every token runs all layers; ``threshold``: a token leaves at the first confident exit;
            ``speculative``: an exit drafts and the full model verifies, with the full model's output.
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
        follow: token ids that the output goes on with, whatever it emits: what a mode says at each position of a given
            text. Not in mode ``speculative``. At most so many tokens are emitted.
        logprobs: so many likeliest tokens with their log-probabilities, beside the emitted one's; None for none.
    """

    prompt: str | Sequence[int]
    mode: Mode = "full"
    policy: ExitPolicy = field(default_factory=ExitPolicy)
    draft: Draft = field(default_factory=Draft)
    exits: Sequence[int] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    max_tokens: int = 64
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    echo: bool = False
    logprobs: int | None = None
    follow: Sequence[int] = ()

    def check(self, exits: Sequence[int], num_layers: int, off: Sequence[int] = ()) -> None:
        """Check all but the prompt.

        Args:
            exits: layers of the exits that there are.
            num_layers: depth of the model.
            off: layers of the exits that are switched off.

        Raises:
            ConfigError: naming the field.
        """
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode: {shown(self.mode)} is unknown; possible: {', '.join(get_args(Mode))}")
        if self.mode != "full" and not exits:
            what = f"those after layers {_listed(off)} are switched off" if off else "give their adapter"
            raise ConfigError(f"mode: {self.mode} needs exits; {what}")
        for name in ("stop", "stop_ids", "follow", *(["exits"] if self.exits is not None else [])):
            value = getattr(self, name)
            if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
                raise ConfigError(f"{name}: must be a list, not {shown(value)}")
        self.policy.check()
        self.sampling.check()
        # A mode that asks no exit may name one that is switched off.
        exits, off = ([*exits, *off], ()) if self.mode == "full" else (exits, off)
        for name, wanted in (("exits", self.exits or ()), ("thresholds", self.policy.thresholds)):
            for layer in wanted:
                _known(name, layer, exits, off)
        if self.exits is not None and not self.exits and self.mode != "full":
            raise ConfigError(f"exits: mode {self.mode} needs at least one")
        self._check_draft(exits, num_layers, off)
        _whole("max_tokens", self.max_tokens, 1)
        _whole("samples", self.samples, 1, 128)
        if self.sampling.seed + self.samples - 1 > MAX_SEED:
            raise ConfigError(f"seed: must leave room for {self.samples} samples up to {MAX_SEED}")
        for name in ("ignore_eos", "echo"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name}: must be true or false, not {shown(getattr(self, name))}")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.follow and self.mode == "speculative":
            raise ConfigError("follow: proposals cannot be verified on a text that is given; use another mode")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError("stop: must be a list of texts that are not empty")

    def _check_draft(self, exits: Sequence[int], num_layers: int, off: Sequence[int]) -> None:
        """Refuse in every mode what could never work, also where the mode makes no use of it."""
        enabled = exits if self.exits is None else self.exits
        drafting = [layer for layer in enabled if layer < num_layers]
        if self.draft.exit is not None:
            if self.draft.exit == num_layers and num_layers in exits:
                raise ConfigError(
                    f"draft.exit: the exit after layer {num_layers} reads the last layer, so that its drafts would "
                    f"spare nothing; exits that can draft: {_listed(drafting)}"
                )
            _known("draft.exit", self.draft.exit, drafting, off)
        elif self.mode == "speculative" and not drafting:
            raise ConfigError("exits: none before the last layer is enabled, so that nothing can draft")
        if self.draft.length is not None:
            _whole("draft.length", self.draft.length, 0, MAX_DRAFT)


def _known(name: str, layer: int, exits: Sequence[int], off: Sequence[int]) -> None:
    if type(layer) is int and layer in off:
        raise ConfigError(f"{name}: the exit after layer {layer} is switched off; there are: {_listed(exits)}")
    if type(layer) is not int or layer not in exits:
        raise ConfigError(f"{name}: there is no exit after layer {shown(layer)}; there are: {_listed(exits)}")


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _whole(name: str, value: object, least: int, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name}: must be a whole number {bounds}, not {shown(value)}")


@dataclass(frozen=True)
class Token:
    """One emitted token.

    Attributes:
        id: token id.
        layer: the layer whose exit emitted it, the last for the final exit; in speculative mode the drafting exit's
            where its proposal stood.
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
        statistics: see ``statistics.row_statistics``.
    """

    text: str
    tokens: tuple[Token, ...]
    pieces: tuple[str, ...]
    finish_reason: FinishReason
    statistics: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """What a step brought for one output.

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
