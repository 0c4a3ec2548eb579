"""A replay: what exits say at each token of a given text, from one pass of the text through all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.inference.heads import LogProbs, most_probable
from megatron_ee.inference.policy import MEASURES

CHUNK = 128
"""Tokens whose logits exist at a time."""


@dataclass(frozen=True)
class ReplayInput:
    """The tokens of a pass at which exits on the way are asked, for one sequence.

    Attributes:
        following: the token that follows each of the pass's last tokens in the text.
        exits: layers of the exits that are asked, besides the final exit.
        measure: confidence measure, a key of ``MEASURES``.
        logprobs: number of most probable tokens whose log-probabilities are returned besides those of the text; None
            for no log-probabilities.
    """

    following: tuple[int, ...]
    exits: tuple[int, ...]
    measure: str = "probability"
    logprobs: int | None = None


@dataclass(frozen=True)
class ExitReplay:
    """What one exit says in place of each token of the text, from the tokens before it. One entry per token.

    All values come from the logits before penalty, temperature and truncation.

    Attributes:
        depth: layer of the exit; for the final exit, the number of layers plus one.
        tokens: the most probable token ids.
        probabilities: of these tokens.
        confidences: in the replay's measure.
        text_probabilities: of the text's own tokens.
        text_ranks: 1 plus the number of tokens that are more probable than the text's own.
        gates: probability of the exit's gate that it agrees with the final exit; empty without a gate.
        logprobs: log-probabilities, with the most probable token as the emitted one and the text's own as the forced
            one; empty if they were not asked for.
    """

    depth: int
    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]
    confidences: tuple[float, ...]
    text_probabilities: tuple[float, ...]
    text_ranks: tuple[int, ...]
    gates: tuple[float, ...] = ()
    logprobs: tuple[LogProbs, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the logits are finite at all tokens."""
        return not any(value != value for value in (*self.probabilities, *self.gates))  # NaN


def replayed_rows(
    asked: ReplayInput,
    x: Tensor,
    features: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    gate: Callable[[Tensor], Tensor] | None,
) -> list[Tensor]:
    """What one exit says at a sequence's tokens of one pass. Starts the work and does not wait for it.

    Args:
        asked: the tokens.
        x: all tokens of the sequence in this pass, ``[tokens, 1, hidden]``.
        features: ``[tokens, 1, hidden]`` -> what the head reads, of the same shape.
        logits: features ``[tokens, hidden]`` -> logits ``[tokens, vocab]`` float32.
        gate: features ``[tokens, hidden]`` -> probabilities ``[tokens]``; None without a gate.

    Returns:
        The rows of ``exit_replay``, float64, in chunks of tokens: ``[rows, tokens]`` each.
    """
    following = platform.to_device(torch.tensor(asked.following), x.device)
    found = []
    for part, ids in zip(x[-len(following) :].split(CHUNK), following.split(CHUNK), strict=True):
        z = features(part)[:, 0]
        scores = logits(z)
        tokens, probabilities = most_probable(scores)
        own, normaliser = scores.gather(1, ids[:, None]), scores.logsumexp(-1)
        rows = [
            tokens,
            probabilities,
            probabilities if asked.measure == "probability" else MEASURES[asked.measure](scores).double(),
            (own[:, 0] - normaliser).exp().double(),
            (scores > own).sum(-1).double() + 1,
        ]
        if gate is not None:
            rows.append(gate(z).double())
        if asked.logprobs is not None:
            best = scores.topk(min(asked.logprobs, scores.shape[1]))
            values = torch.cat((scores.amax(-1)[None], own.T, best.values.T))
            rows += [*(values - normaliser).double(), *best.indices.T.double()]
        found.append(torch.stack(rows))
    return found


def exit_replay(depth: int, parts: Sequence[Tensor], *, gated: bool) -> ExitReplay:
    """The results of one exit, from those of ``replayed_rows`` for all passes. Waits for the device."""
    tokens, probabilities, confidences, own, ranks, *rest = torch.cat(list(parts), dim=1).tolist()
    gates = rest.pop(0) if gated else ()
    return ExitReplay(
        depth,
        tuple(map(int, tokens)),
        tuple(probabilities),
        tuple(confidences),
        tuple(own),
        tuple(map(int, ranks)),
        tuple(gates),
        _logprobs(*rest) if rest else (),
    )


def _logprobs(emitted: list[float], text: list[float], *top: list[float]) -> tuple[LogProbs, ...]:
    """Log-probabilities from their rows; ``top`` holds those of the most probable tokens, then the ids of these."""
    best = list(zip(top[len(top) // 2 :], top[: len(top) // 2], strict=True))
    return tuple(
        LogProbs(emitted[n], {int(ids[n]): values[n] for ids, values in best}, text[n]) for n in range(len(text))
    )
