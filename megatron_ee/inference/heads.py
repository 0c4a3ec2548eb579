"""Turns the logits of a head into tokens, for all sequences of a pass at once. Pure functions, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import Literal

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.inference.policy import MEASURES, AnyPolicy
from megatron_ee.inference.sampling import (
    Proposals,
    Sampling,
    check_mass,
    count_penalised,
    penalised,
    probabilities,
    verify,
)

Kind = Literal["leave", "draft", "emit", "verify"]


@dataclass(frozen=True)
class HeadInput:
    """The task of the head at the end of a pass, for one sequence.

    Attributes:
        kind: ``leave``: emit the next token if the policy lets it leave at this exit; ``draft``: propose the next
            token; ``emit``: emit the next token at any confidence; ``verify``: accept or reject ``proposals``, and emit
            the token after the accepted ones.
        position: position of the next token; with proposals, of the first one.
        sampling: sampling settings of the request.
        policy: defines the confidence measure, and decides with ``leave``; None for the maximum probability.
        layer: layer of the exit, with ``leave``.
        proposals: draft tokens to verify; they are the last tokens of the pass.
        seen: ids of the prompt and the emitted tokens if there is a penalty; else empty.
        seen_prompt: number of ids in ``seen`` that are the prompt's.
        logprobs: number of most probable tokens whose log-probabilities are returned besides the emitted token's; None
            for no log-probabilities.
        min_chance: with ``draft``, the gate's probability below which the draft ends before the head runs.
        forced: the token that follows in place of the emitted one; None for none.
    """

    kind: Kind
    position: int
    sampling: Sampling = field(default_factory=Sampling)
    policy: AnyPolicy | None = None
    layer: int = 0
    proposals: tuple[int, ...] = ()
    seen: tuple[int, ...] = ()
    seen_prompt: int = 0
    logprobs: int | None = None
    min_chance: float = 0.0
    forced: int | None = None

    @property
    def gated(self) -> bool:
        """Whether the exit's gate, if it has one, decides whether the head runs."""
        if self.kind == "draft":
            return self.min_chance > 0
        return self.kind == "leave" and self.policy is not None and self.policy.gated

    def passes(self, chance: float) -> bool:
        """Whether the head runs at this probability of the gate."""
        if self.kind == "draft" or self.policy is None:
            return chance >= self.min_chance
        return self.policy.leaves(self.layer, chance)

    @property
    def measure(self) -> str:
        """The confidence measure, a key of ``MEASURES``."""
        return "probability" if self.policy is None else self.policy.measure

    @property
    def plain(self) -> bool:
        """Whether only the most probable token and its probability are needed."""
        sampling = self.sampling
        plain = sampling.greedy and not sampling.penalises
        return plain and self.logprobs is None and self.measure == "probability"

    @property
    def tokens(self) -> int:
        """Number of the sequence's last tokens that the head reads."""
        return len(self.proposals) + 1


@dataclass(frozen=True)
class LogProbs:
    """Natural log-probabilities at one position, from the logits before the penalty, temperature and truncation.

    Attributes:
        emitted: of the emitted token.
        top: of the most probable tokens, by token id.
        forced: of the token that follows in place of the emitted one; None without forced tokens.
    """

    emitted: float
    top: dict[int, float]
    forced: float | None = None


@dataclass(frozen=True)
class HeadOutput:
    """The result of a head for one sequence.

    Attributes:
        tokens: emitted or proposed tokens, in order. Empty if the token does not leave at this exit, or if a gate ends
            the draft. With ``verify``, the accepted proposals and one more token.
        confidences: confidence of the head for each of ``tokens``, or the gate's probability if it decided.
        logprobs: log-probabilities for each of ``tokens``, if requested.
        finite: False if the logits hold NaN or +inf, or are all -inf; the other attributes then have no meaning.
            Single -inf logits, of tokens that cannot be chosen, are allowed.
    """

    tokens: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    logprobs: tuple[LogProbs, ...] = ()
    finite: bool = True


def most_probable(logits: Tensor) -> Tensor:
    """The most probable next token and its probability, at each position.

    Args:
        logits: ``[tokens, vocab]`` float32.

    Returns:
        ``[2, tokens]`` float64: token ids, and their probabilities.
    """
    highest, top1 = logits.max(-1)
    confidence = (highest - logits.logsumexp(-1)).exp()
    return torch.stack((top1.double(), confidence.double()))


def head_outputs(logits: Tensor, inputs: Sequence[HeadInput], drafts: Sequence[Sequence[Tensor]]) -> list[HeadOutput]:
    """Compute the outputs of one head, with a single transfer from the device to the host.

    Args:
        logits: ``[sum of the inputs' tokens, vocab]`` float32; they may be non-finite.
        inputs: one per sequence.
        drafts: per sequence, the distributions ``[vocab]`` that its proposals were sampled from. A sampled ``draft``
            appends its own to the sequence's list.
    """
    tops = most_probable(logits)
    if all(each.plain for each in inputs):
        chosen, shares = tops.tolist()
        ids, parts = [int(token) for token in chosen], _spans(inputs)
        return [_greedy(each, ids[part], shares[part]) for each, part in zip(inputs, parts, strict=True)]
    return _read(_queue(logits, inputs, drafts, tops), inputs)


@dataclass(frozen=True)
class _Queued:
    """Results of one head on the device, before the transfer to the host.

    Attributes:
        chosen: the most probable next token after the penalty, ``[tokens]``.
        shares: by measure, the confidence ``[tokens]``.
        verified: result of ``verify`` for the sampled sequences; None without any.
        logprobs: for the sequences that request them, log-probabilities of the emitted and the forced token
            ``[tokens, 2]`` (equal without a forced one), the largest log-probabilities ``[tokens, most]``, and their
            token ids; None without any.
    """

    chosen: Tensor
    shares: dict[str, Tensor]
    verified: tuple[Tensor, Tensor, Tensor] | None
    logprobs: tuple[Tensor, Tensor, Tensor] | None


def _queue(logits: Tensor, inputs: Sequence[HeadInput], drafts: Sequence[Sequence[Tensor]], tops: Tensor) -> _Queued:
    """Start all computations that may be needed; whether a token leaves is known only after the transfer."""
    rows = [(each, number) for each in inputs for number in range(each.tokens)]
    samplings = [each.sampling for each, _ in rows]
    seen = [(*each.seen, *each.proposals[:number]) for each, number in rows]
    after = penalised(logits, seen, [sampling.repetition_penalty for sampling in samplings])
    outputs = [ids[each.seen_prompt :] for ids, (each, _) in zip(seen, rows, strict=True)]
    after = count_penalised(after, outputs, samplings)
    chosen = tops[0] if after is logits else after.argmax(-1)
    measures = {each.measure for each in inputs}
    shares = {m: tops[1] if m == "probability" else MEASURES[m](logits) for m in measures}
    verified = _verify(after, inputs, drafts)
    most = max((each.logprobs for each in inputs if each.logprobs is not None), default=None)
    if most is None:
        return _Queued(chosen, shares, verified, None)
    emitted = chosen.long()
    if verified is not None:
        emitted = _replace(emitted, inputs, verified[1])
    wanted = [each.logprobs is not None for each in inputs]
    scores = _rows(logits, inputs, wanted).log_softmax(-1)
    pairs = torch.stack((emitted, _with_forced(emitted, inputs)), dim=1)
    own = scores.gather(1, _rows(pairs, inputs, wanted))
    best = scores.topk(min(most, scores.shape[1]))
    return _Queued(chosen, shares, verified, (own, best.values, best.indices))


def _verify(
    logits: Tensor, inputs: Sequence[HeadInput], drafts: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``verify`` for the sampled sequences, from logits after the penalty; None without any.

    Appends the distributions of sampled ``draft`` inputs to ``drafts``.
    """
    sampled = [not each.sampling.greedy for each in inputs]
    if not any(sampled):
        return None
    mine = [(each, draft) for each, draft, draws in zip(inputs, drafts, sampled, strict=True) if draws]
    target = probabilities(
        _rows(logits, inputs, sampled),
        [each.sampling for each, _ in mine for _ in range(each.tokens)],
    )
    proposed = [q for each, draft in mine if each.kind == "verify" for q in draft]
    purposes = ["draft" if each.kind == "draft" else "target" for each, _ in mine]
    proposals = [
        Proposals(each.proposals, each.sampling.seed, each.position, purpose)
        for (each, _), purpose in zip(mine, purposes, strict=True)
    ]
    for (each, draft), rows in zip(mine, target.split([each.tokens for each, _ in mine]), strict=True):
        if each.kind == "draft":
            assert isinstance(draft, list)
            draft.append(rows[0])
    return verify(target, torch.stack(proposed) if proposed else target[:0], proposals)


def _replace(chosen: Tensor, inputs: Sequence[HeadInput], tokens: Tensor) -> Tensor:
    """Replace the entries of sampled sequences in ``chosen`` ``[tokens]`` by ``tokens``, which ``verify`` returned."""
    cells, row = [], 0
    for each, part in zip(inputs, _spans(inputs), strict=True):
        if not each.sampling.greedy:
            cells += [(part.start + number, row, number) for number in range(each.tokens)]
            row += 1
    where, rows, numbers = platform.to_device(torch.tensor(cells), chosen.device).unbind(1)
    return chosen.index_copy(0, where, tokens[rows, numbers])


def _with_forced(emitted: Tensor, inputs: Sequence[HeadInput]) -> Tensor:
    """``emitted`` ``[tokens]`` with the forced tokens in place of the emitted ones."""
    forced = [-1 if each.forced is None else each.forced for each in inputs for _ in range(each.tokens)]
    if max(forced) < 0:
        return emitted
    given = platform.to_device(torch.tensor(forced), emitted.device)
    return torch.where(given < 0, emitted, given)


def _read(queued: _Queued, inputs: Sequence[HeadInput]) -> list[HeadOutput]:
    """Transfer the results to the host, in one copy, and build the outputs."""
    tensors = [queued.chosen, *queued.shares.values(), *(queued.verified or ()), *(queued.logprobs or ())]
    numbers = torch.cat([tensor.double().flatten() for tensor in tensors]).tolist()
    lists = iter(_cut(numbers, [tensor.numel() for tensor in tensors]))
    chosen = [int(token) for token in next(lists)]
    shares = {measure: next(lists) for measure in queued.shares}
    drawn: Iterator[tuple[float, list[float], float]] = iter(())
    if queued.verified is not None:
        accepted, tokens, masses = (next(lists) for _ in queued.verified)
        drawn = zip(accepted, _cut(tokens, [queued.verified[1].shape[1]] * len(accepted)), masses, strict=True)
    logprobs: Iterator[LogProbs] = iter(())
    if queued.logprobs is not None:
        own, values, ids = (next(lists) for _ in queued.logprobs)
        sizes = [queued.logprobs[1].shape[1]] * (len(own) // 2)
        tops = map(_by_token, _cut(ids, sizes), _cut(values, sizes))
        logprobs = map(LogProbs, own[::2], tops, own[1::2])
    found = []
    for each, part in zip(inputs, _spans(inputs), strict=True):
        confidence = shares[each.measure][part]
        draw = None if each.sampling.greedy else next(drawn)
        own_logprobs = [] if each.logprobs is None else [next(logprobs) for _ in range(each.tokens)]
        if draw is None:
            one = _greedy(each, chosen[part], confidence)
        else:
            one = _drawn(each, confidence, *draw)
        given = (
            LogProbs(lp.emitted, _first(lp.top, each.logprobs), None if each.forced is None else lp.forced)
            for lp in own_logprobs[: len(one.tokens)]
        )
        found.append(replace(one, logprobs=tuple(given)))
    return found


def _emits(each: HeadInput, confidence: float) -> bool:
    """Whether this head gives a token; with ``leave``, whether the policy lets it leave."""
    return each.kind != "leave" or each.policy is None or each.policy.leaves(each.layer, confidence)


def _greedy(each: HeadInput, tokens: list[int], shares: list[float]) -> HeadOutput:
    """Output of a greedy sequence, from the most probable next tokens and their confidences."""
    if any(share != share for share in shares):
        return HeadOutput(finite=False)
    if not _emits(each, shares[-1]):
        return HeadOutput()
    count = 0
    while count < len(each.proposals) and tokens[count] == each.proposals[count]:
        count += 1
    return HeadOutput(tuple(tokens[: count + 1]), tuple(shares[: count + 1]))


def _drawn(each: HeadInput, shares: list[float], accepted: float, tokens: list[float], mass: float) -> HeadOutput:
    """Output of a sampled sequence, from the results of ``verify``."""
    if any(share != share for share in shares):  # NaN
        return HeadOutput(finite=False)
    if not _emits(each, shares[-1]):
        return HeadOutput()
    check_mass(mass)
    count = int(accepted) + 1
    return HeadOutput(tuple(int(token) for token in tokens[:count]), tuple(shares[:count]))


def _spans(inputs: Sequence[HeadInput]) -> list[slice]:
    """Range of each sequence's tokens in the batch."""
    ends = list(accumulate(each.tokens for each in inputs))
    return [slice(end - each.tokens, end) for each, end in zip(inputs, ends, strict=True)]


def _rows(tensor: Tensor, inputs: Sequence[HeadInput], wanted: Sequence[bool]) -> Tensor:
    """The tokens of the wanted sequences, ``[tokens, ...]``."""
    if all(wanted):
        return tensor
    return torch.cat([tensor[part] for part, taken in zip(_spans(inputs), wanted, strict=True) if taken])


def _cut(values: list[float], sizes: Sequence[int]) -> list[list[float]]:
    ends = list(accumulate(sizes))
    return [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _by_token(ids: list[float], values: list[float]) -> dict[int, float]:
    return dict(zip(map(int, ids), values, strict=True))


def _first(top: dict[int, float], count: int | None) -> dict[int, float]:
    return dict(islice(top.items(), count))
