"""Turns the tokens of a sequence into the user's output: streamed text, the completion, and statistics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_ee.data.tokenizer import Detokenizer, Tokenizer
from megatron_ee.errors import ConfigError, shown
from megatron_ee.inference.requests import Completion, Coverage, Event, Token
from megatron_ee.inference.sequence import Sequence


class TextStream:
    """Streams the text of one output. Incomplete characters and possible starts of a stop string are held back.

    The concatenated results of ``push`` and ``finish`` are the part of ``decode(prompt + tokens)`` after
    ``decode(prompt)``, up to the stop string that ends first. If several end at the same character, the longest counts.
    The result depends on the text only, not on the token boundaries. The prompt is not searched for stop strings.

    Attributes:
        stopped: the stop string that was found, or None. After it, no more text is returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Collection[int] = (), stop: Collection[str] = ()) -> None:
        """Start after ``prompt_ids``.

        Raises:
            ConfigError: ``stop`` is not a list of strings, or one of them is empty.
        """
        if isinstance(stop, str) or not all(isinstance(each, str) for each in stop):
            raise ConfigError(f"stop: must be a list of strings, not {shown(stop)}")
        if not all(stop):
            raise ConfigError("stop: holds an empty string, which would end every output at once; leave it out")
        self.stopped: str | None = None
        self._tokens = Detokenizer(tokenizer, list(prompt_ids))
        self._stop = sorted(set(stop), key=len, reverse=True)
        self._held = ""  # a possible start of a stop string

    def push(self, token_id: int) -> str:
        """Add a token. Returns the text that is now final; it may be empty, or include text of earlier tokens."""
        if self.stopped is not None:
            return ""
        return self._take(self._tokens.push(token_id))

    def finish(self) -> str:
        """Return the text that was held back, after the last token. A stop string may be found here too."""
        if self.stopped is not None:
            return ""
        certain = self._take(self._tokens.flush())
        rest, self._held = self._held, ""
        return certain + rest

    def _take(self, new: str) -> str:
        """The part of the held text and ``new`` that is now final."""
        if not self._stop or not new:
            return new
        text = self._held + new
        # Earliest end, then longest: ``min`` keeps the first of equal ends, and longer stop strings come first.
        found = [(start + len(stop), stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            end, self.stopped = min(found, key=lambda pair: pair[0])
            self._held = ""
            return text[: end - len(self.stopped)]
        length = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - length :]
        return text[: len(text) - length]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class OutputState:
    """The output of one sequence so far.

    Attributes:
        seq: the scheduler's sequence; read only.
        tokens: emitted tokens, up to the one that completes a stop string.
        pieces: the text that each token added.
        submitted: when the request was submitted, in seconds of ``time.perf_counter``.
        first_token: when the first token was emitted, on the same clock; None before.
        last_token: likewise of the last token so far.
        coverage: what a certificate says of the output; None without one.
    """

    def __init__(self, seq: Sequence, text: TextStream | None, prefix: str, coverage: Coverage | None = None) -> None:
        """Start an output.

        Args:
            seq: its sequence.
            text: None without a tokenizer.
            prefix: start of the completion's text.
            coverage: see ``Request``.
        """
        self.seq, self.coverage = seq, coverage
        self.tokens: list[Token] = []
        self.pieces: list[str] = []
        self.submitted = time.perf_counter()
        self.first_token: float | None = None
        self.last_token: float | None = None
        self._text, self._prefix = text, prefix

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._text is not None and self._text.stopped is not None

    def push(self, tokens: Iterable[Token]) -> tuple[str, tuple[Token, ...]]:
        """Add new tokens, up to the one that completes a stop string.

        Returns:
            The text that became final, and the tokens that were added.
        """
        now = time.perf_counter()
        self.first_token, self.last_token = self.first_token or now, now
        text, taken = "", []
        for token in tokens:
            silent = self._text is None or token.id in self.seq.params.eos_token_ids  # end of text has no text
            piece = "" if silent or self._text is None else self._text.push(token.id)
            self.tokens.append(token)
            self.pieces.append(piece)
            taken.append(token)
            text += piece
            if self.stopped:
                break
        return text, tuple(taken)

    def finish(self) -> Event:
        """Return the last event, with the text that was held back and the completion."""
        rest = "" if self._text is None else self._text.finish()  # may complete a stop string
        if rest and self.pieces:
            self.pieces[-1] += rest
        reason = "stop" if self.stopped else self.seq.finish_reason
        assert reason is not None, "the sequence has not ended"
        completion = Completion(
            text=self._prefix + "".join(self.pieces),
            tokens=tuple(self.tokens),
            pieces=tuple(self.pieces),
            finish_reason=reason,
            statistics={"finish_reason": reason, **self.statistics()},
            replay=self.seq.replay,
        )
        return Event(self.seq.params.request, self.seq.params.sample, text=rest, completion=completion)

    def statistics(self) -> dict[str, Any]:
        """Statistics of this output, in JSON types. A value is None if the output has too few tokens for it.

        ``layers_per_token`` is the number of decoder layers run per token after the first one, including those for
        deferred tokens and rejected proposals; the own layer of a ``layer`` exit counts if its head was asked.
        ``layer_runs`` is their sum, and ``later_tokens`` the number of these tokens.
        ``heads_per_token`` is the number of heads run per token after the first one; a verification counts once.
        ``rounds`` is the number of verifications, also without a proposal, and ``drafts`` the number of those with one.
        ``proposed`` is the number of proposals, and ``acceptance_rate`` the share of them that was accepted. ``judged``
        is the number of them up to and including the first rejected one of each round. ``accepted_per_position`` counts
        the accepted ones by their position in a round. ``reused_tokens`` is the number of prompt tokens whose KV was
        copied from another request. Times are in seconds. ``queue_time`` is the time until the sequence was first
        scheduled, ``decode_time`` that from the first to the last token. ``tokens_per_second`` excludes the prompt and
        the first token. ``calibration`` is the request's ``coverage``, if it has one.
        """
        seq, count = self.seq, len(self.tokens)
        first, last = self.first_token, self.last_token
        spent = last - first if first is not None and last is not None else 0.0
        drafting = seq.drafting
        return {
            "prompt_tokens": seq.num_prompt_tokens,
            "reused_tokens": seq.num_cached_tokens,
            "tokens": count,
            "tokens_by_layer": _by_layer(Counter(token.layer for token in self.tokens)),
            "mean_exit_layer": sum(token.layer for token in self.tokens) / count if count else None,
            "later_tokens": max(count - 1, 0),
            "layer_runs": seq.num_layer_runs,
            "layers_per_token": seq.num_layer_runs / (count - 1) if count > 1 else None,
            "heads_per_token": seq.num_head_runs / (count - 1) if count > 1 else None,
            "deferred_tokens": sum(seq.deferred.values()),
            "rounds": 0 if drafting is None else drafting.num_rounds,
            "drafts": seq.num_drafts,
            "proposed": seq.num_draft_tokens,
            "judged": seq.num_judged_tokens,
            "accepted": seq.num_accepted_tokens,
            "accepted_per_position": list(seq.num_accepted_tokens_per_pos),
            "acceptance_rate": seq.num_accepted_tokens / seq.num_draft_tokens if seq.num_draft_tokens else None,
            "queue_time": None if seq.scheduled is None else seq.scheduled - self.submitted,
            "time_to_first_token": None if first is None else first - self.submitted,
            "decode_time": spent,
            "tokens_per_second": (count - 1) / spent if count > 1 and spent > 0 else None,
            "confidences": [token.confidence for token in self.tokens],
            **({} if self.coverage is None else {"calibration": self.coverage.model_dump(mode="json")}),
        }


@dataclass
class Totals:
    """Sums over the finished outputs. ``later_tokens`` excludes the first token of each output.

    Their size does not grow, so that an engine can run for months.
    """

    outputs: int = 0
    tokens: int = 0
    later_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    layer_runs: int = 0
    head_runs: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    by_layer: Counter[int] = field(default_factory=Counter)
    by_coverage: Counter[str] = field(default_factory=Counter)
    first_tokens: int = 0
    first_token_seconds: float = 0.0

    def add(self, output: OutputState) -> None:
        """Add a finished output."""
        seq, count = output.seq, len(output.tokens)
        self.outputs += 1
        self.tokens += count
        self.later_tokens += max(count - 1, 0)
        self.prompt_tokens += seq.num_prompt_tokens
        self.cached_tokens += seq.num_cached_tokens
        self.layer_runs += seq.num_layer_runs
        self.head_runs += seq.num_head_runs
        self.draft_tokens += seq.num_draft_tokens
        self.accepted_tokens += seq.num_accepted_tokens
        self.by_layer.update(token.layer for token in output.tokens)
        if output.coverage is not None:
            self.by_coverage[output.coverage.status] += 1
        if output.first_token is not None:
            self.first_tokens += 1
            self.first_token_seconds += output.first_token - output.submitted

    def to_dict(self, seconds: float) -> dict[str, Any]:
        """The totals in JSON types; ``seconds`` is the time in which the engine had work."""
        return {
            "outputs": self.outputs,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.cached_tokens,
            "tokens": self.tokens,
            "tokens_by_layer": _by_layer(self.by_layer),
            "mean_exit_layer": self.by_layer.total() and sum(k * n for k, n in self.by_layer.items()) / self.tokens,
            "layers_per_token": self.layer_runs / self.later_tokens if self.later_tokens else None,
            "heads_per_token": self.head_runs / self.later_tokens if self.later_tokens else None,
            "proposed": self.draft_tokens,
            "accepted": self.accepted_tokens,
            "acceptance_rate": self.accepted_tokens / self.draft_tokens if self.draft_tokens else None,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds if seconds > 0 else None,
            "mean_time_to_first_token": self.first_token_seconds / self.first_tokens if self.first_tokens else None,
            **({"calibration": dict(self.by_coverage)} if self.by_coverage else {}),
        }


def _by_layer(counts: Counter[int]) -> dict[str, int]:
    return {str(layer): number for layer, number in sorted(counts.items())}
