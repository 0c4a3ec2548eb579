"""What a head is asked about a row, and what it answers: from logits to tokens, without model or state."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_ee.inference.policy import Measure, confidences
from megatron_ee.inference.sampling import Sampling, draw, penalised, probabilities, uniform, verify

Kind = Literal["leave", "draft", "emit", "verify"]


@dataclass(frozen=True)
class Ask:
    """What the head after a chain is asked about one row.

    Attributes:
        kind: ``leave``: whether the newest token's successor leaves here; ``draft``: a proposal for it; ``emit``: it,
            whatever the confidence; ``verify``: which of ``proposals`` stand, and the token after them.
        position: of the token that is asked for, the first one with ``verify``.
        sampling: how it is chosen.
        measure: of confidence.
        threshold: least confidence to leave with.
        proposals: of the last tokens; the newest token run is the last of them.
        seen: prompt and tokens so far, where ``sampling`` has a repetition penalty; else empty.
        logprobs: how many of the likeliest tokens to give with their log-probabilities, beside the emitted one's;
            None for none at all.
    """

    kind: Kind
    position: int
    sampling: Sampling = field(default_factory=Sampling)
    measure: Measure = "probability"
    threshold: float = 0.0
    proposals: tuple[int, ...] = ()
    seen: tuple[int, ...] = ()
    logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the maximum of the logits and its probability are all that is needed."""
        sampling = self.sampling
        plain = sampling.greedy and sampling.repetition_penalty == 1
        return plain and self.logprobs is None and self.measure == "probability"

    @property
    def tokens(self) -> int:
        """How many of the row's last tokens the head reads."""
        return len(self.proposals) + 1


@dataclass(frozen=True)
class LogProbs:
    """Natural log-probabilities of one position, before temperature and the like: of the token emitted there, and of
    the likeliest ones by token."""

    emitted: float
    top: dict[int, float]


@dataclass(frozen=True)
class Answer:
    """What a head says.

    Attributes:
        tokens: emitted, in order: none where the row goes on to a deeper head; with ``verify`` the proposals that stood
            and one more.
        confidences: of the head at each of ``tokens``.
        logprobs: of each, where asked for.
        finite: whether the logits were (-inf, a token that cannot be chosen, may be among them); if not, nothing else
            means anything.
    """

    tokens: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    logprobs: tuple[LogProbs, ...] = ()
    finite: bool = True


def single(value: float) -> float:
    """``value`` as float32 holds it: thresholds are compared with confidences as tensors would be."""
    return float(struct.unpack("f", struct.pack("f", min(value, 3e38)))[0])


def likeliest(logits: Tensor) -> Tensor:
    """Of ``[tokens, vocab]`` float32 each token's likeliest successor and its probability, ``[2, tokens]`` float64."""
    highest, top1 = logits.max(-1)
    sure = (highest - logits.logsumexp(-1)).exp()
    return torch.stack((top1.double(), sure.double()))


def answer(
    logits: Tensor, asks: Sequence[Ask], drafts: Sequence[Sequence[Tensor]], tops: Tensor | None = None
) -> list[Answer]:
    """Answers of one head.

    Args:
        logits: ``[sum of the asks' tokens, vocab]`` float32, finite or not.
        asks: of the rows.
        drafts: of each row, the distributions ``[vocab]`` that its proposals were drawn from; a ``draft`` that samples
            appends to a list here.
        tops: ``likeliest`` of the logits, if that is known.
    """
    if all(ask.plain for ask in asks):
        return _plain(likeliest(logits) if tops is None else tops, asks)
    found, start = [], 0
    for ask, draft in zip(asks, drafts, strict=True):
        found.append(_one(logits[start : start + ask.tokens], ask, draft))
        start += ask.tokens
    return found


def _plain(tops: Tensor, asks: Sequence[Ask]) -> list[Answer]:
    """Greedy rows: two numbers per position are all that leaves the device, at once."""
    ids, shares = tops.tolist()
    found, start, tokens = [], 0, [int(token) for token in ids]
    for ask in asks:
        stop = start + ask.tokens
        found.append(_greedy(ask, tokens[start:stop], shares[start:stop]))
        start = stop
    return found


def _greedy(ask: Ask, tokens: list[int], shares: list[float]) -> Answer:
    if any(share != share for share in shares):
        return Answer(finite=False)
    if ask.kind == "leave" and not shares[-1] >= ask.threshold:
        return Answer()
    count = 0
    while count < len(ask.proposals) and tokens[count] == ask.proposals[count]:
        count += 1
    return Answer(tuple(tokens[: count + 1]), tuple(shares[: count + 1]))


def _one(logits: Tensor, ask: Ask, draft: Sequence[Tensor]) -> Answer:
    """One row, ``[tokens, vocab]``."""
    shares = confidences(logits, ask.measure).tolist()
    if any(share != share for share in shares):  # as for greedy rows: a single -inf is a token that cannot be chosen
        return Answer(finite=False)
    if ask.kind == "leave" and not shares[-1] >= ask.threshold:
        return Answer()
    sampling, position = ask.sampling, ask.position
    chosen = [
        penalised(row, (*ask.seen, *ask.proposals[:number]), sampling.repetition_penalty)
        for number, row in enumerate(logits)
    ]
    if sampling.greedy:
        emitted = _greedy(ask, [int(row.argmax()) for row in chosen], shares).tokens
    elif ask.kind == "verify":
        target = torch.stack([probabilities(row, sampling) for row in chosen])
        stood, token = verify(target, torch.stack(list(draft)), ask.proposals, sampling.seed, position)
        emitted = (*ask.proposals[:stood], token)
    else:
        distribution = probabilities(chosen[-1], sampling)
        if ask.kind == "draft":
            assert isinstance(draft, list)
            draft.append(distribution)
        purpose = "draft" if ask.kind == "draft" else "target"
        emitted = (draw(distribution, uniform(sampling.seed, position, purpose)),)
    return Answer(emitted, tuple(shares[: len(emitted)]), _logprobs(logits, emitted, ask.logprobs))


def _logprobs(logits: Tensor, emitted: Sequence[int], top: int | None) -> tuple[LogProbs, ...]:
    if top is None:
        return ()
    found = []
    for row, token in zip(logits, emitted, strict=False):
        scores = row.log_softmax(-1)
        best = scores.topk(min(top, len(scores)))
        likeliest = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        found.append(LogProbs(float(scores[token]), likeliest))
    return tuple(found)
