"""From a head's logits to tokens: what it has to do for each sequence, and what comes of it. No model, no state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import Literal

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.inference.policy import MEASURES, AnyPolicy
from megatron_ee.inference.sampling import Proposals, Sampling, check_mass, penalised, probabilities, verify

Kind = Literal["leave", "draft", "emit", "verify"]


@dataclass(frozen=True)
class HeadInput:
    """What the head at the end of a pass has to do for one sequence.

    Attributes:
        kind: ``leave``: emit the next token if the policy lets it leave here; ``draft``: propose it; ``emit``: emit it
            whatever the confidence; ``verify``: accept or reject ``proposals``, and emit the token after them.
        position: of the next token; of the first proposal with ``verify``.
        sampling: how it is chosen.
        policy: says what confidence is, and decides with ``leave``; None takes the probability.
        layer: of the exit, with ``leave``.
        proposals: the last tokens that ran, to be verified.
        seen: prompt and tokens so far, where ``sampling`` has a repetition penalty; else empty.
        logprobs: how many of the most probable tokens to give with their log-probabilities, beside the emitted one's;
            None for none at all.
    """

    kind: Kind
    position: int
    sampling: Sampling = field(default_factory=Sampling)
    policy: AnyPolicy | None = None
    layer: int = 0
    proposals: tuple[int, ...] = ()
    seen: tuple[int, ...] = ()
    logprobs: int | None = None

    @property
    def measure(self) -> str:
        """Of confidence, a key of ``MEASURES``."""
        return "probability" if self.policy is None else self.policy.measure

    @property
    def plain(self) -> bool:
        """Whether the maximum of the logits and its probability are all that is needed."""
        sampling = self.sampling
        plain = sampling.greedy and sampling.repetition_penalty == 1
        return plain and self.logprobs is None and self.measure == "probability"

    @property
    def tokens(self) -> int:
        """How many of the sequence's last tokens the head reads."""
        return len(self.proposals) + 1


@dataclass(frozen=True)
class LogProbs:
    """Natural log-probabilities of one position, before temperature and the like: of the token emitted there, and of
    the most probable ones by token."""

    emitted: float
    top: dict[int, float]


@dataclass(frozen=True)
class HeadOutput:
    """What comes of a head for one sequence.

    Attributes:
        tokens: emitted, in order: none where the sequence goes on to a deeper head; with ``verify`` the accepted
            proposals and one more.
        confidences: of the head at each of ``tokens``.
        logprobs: of each, where asked for.
        finite: whether the logits were (-inf, a token that cannot be chosen, may be among them); if not, nothing else
            means anything.
    """

    tokens: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    logprobs: tuple[LogProbs, ...] = ()
    finite: bool = True


def most_probable(logits: Tensor) -> Tensor:
    """Of ``[tokens, vocab]`` float32 each token's most probable successor and its probability.

    Returns:
        ``[2, tokens]`` float64: token ids, and their probabilities.
    """
    highest, top1 = logits.max(-1)
    confidence = (highest - logits.logsumexp(-1)).exp()
    return torch.stack((top1.double(), confidence.double()))


def head_outputs(logits: Tensor, inputs: Sequence[HeadInput], drafts: Sequence[Sequence[Tensor]]) -> list[HeadOutput]:
    """Outputs of one head. The host waits once, for one transfer of all sequences' results from the device.

    Args:
        logits: ``[sum of the inputs' tokens, vocab]`` float32, finite or not.
        inputs: of the sequences.
        drafts: of each, the distributions ``[vocab]`` that its proposals were drawn from; a ``draft`` that samples
            appends to a list here.
    """
    tops = most_probable(logits)
    if all(each.plain for each in inputs):
        chosen, shares = tops.tolist()
        ids, parts = [int(token) for token in chosen], _spans(inputs)
        return [_greedy(each, ids[part], shares[part]) for each, part in zip(inputs, parts, strict=True)]
    return _read(_queue(logits, inputs, drafts, tops), inputs)


@dataclass(frozen=True)
class _Queued:
    """Results of one head on the device, which are read together.

    Attributes:
        chosen: each token's most probable successor after the penalty, ``[tokens]``.
        shares: by measure, each token's confidence ``[tokens]``.
        verified: what ``verify`` gave for the rows that sample; None where no row does.
        logprobs: of the tokens of rows that want them: log-probability of the emitted one ``[tokens, 1]``, and of the
            most probable ones, ``[tokens, most]``, with their ids; None where no row does.
    """

    chosen: Tensor
    shares: dict[str, Tensor]
    verified: tuple[Tensor, Tensor, Tensor] | None
    logprobs: tuple[Tensor, Tensor, Tensor] | None


def _queue(logits: Tensor, inputs: Sequence[HeadInput], drafts: Sequence[Sequence[Tensor]], tops: Tensor) -> _Queued:
    """Start all that the sequences may need. Whether one leaves is not known yet: that would take another transfer."""
    seen = [(*each.seen, *each.proposals[:number]) for each in inputs for number in range(each.tokens)]
    after = penalised(
        logits,
        seen,
        [each.sampling.repetition_penalty for each in inputs for _ in range(each.tokens)],
    )
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
    own = scores.gather(1, _rows(emitted, inputs, wanted)[:, None])
    best = scores.topk(min(most, scores.shape[1]))
    return _Queued(chosen, shares, verified, (own, best.values, best.indices))


def _verify(
    logits: Tensor, inputs: Sequence[HeadInput], drafts: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What ``verify`` gives for the rows that sample, of logits after the penalty; and their drafts are kept."""
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
    """``chosen`` ``[tokens]`` with those of rows that sample taken from ``tokens``, as ``verify`` gives them."""
    cells, row = [], 0
    for each, part in zip(inputs, _spans(inputs), strict=True):
        if not each.sampling.greedy:
            cells += [(part.start + number, row, number) for number in range(each.tokens)]
            row += 1
    where, rows, numbers = platform.to_device(torch.tensor(cells), chosen.device).unbind(1)
    return chosen.index_copy(0, where, tokens[rows, numbers])


def _read(queued: _Queued, inputs: Sequence[HeadInput]) -> list[HeadOutput]:
    """In one transfer."""
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
        sizes = [queued.logprobs[1].shape[1]] * len(own)
        logprobs = map(LogProbs, own, map(_by_token, _cut(ids, sizes), _cut(values, sizes)))
    found = []
    for each, part in zip(inputs, _spans(inputs), strict=True):
        confidence = shares[each.measure][part]
        draw = None if each.sampling.greedy else next(drawn)
        own_logprobs = [] if each.logprobs is None else [next(logprobs) for _ in range(each.tokens)]
        if draw is None:
            one = _greedy(each, chosen[part], confidence)
        else:
            one = _drawn(each, confidence, *draw)
        given = (LogProbs(lp.emitted, _first(lp.top, each.logprobs)) for lp in own_logprobs[: len(one.tokens)])
        found.append(replace(one, logprobs=tuple(given)))
    return found


def _emits(each: HeadInput, confidence: float) -> bool:
    """Whether a token comes out of this head: not where it goes on to a deeper one."""
    return each.kind != "leave" or each.policy is None or each.policy.leaves(each.layer, confidence)


def _greedy(each: HeadInput, tokens: list[int], shares: list[float]) -> HeadOutput:
    """One greedy sequence: the most probable successor of each token, and its confidence."""
    if any(share != share for share in shares):
        return HeadOutput(finite=False)
    if not _emits(each, shares[-1]):
        return HeadOutput()
    count = 0
    while count < len(each.proposals) and tokens[count] == each.proposals[count]:
        count += 1
    return HeadOutput(tuple(tokens[: count + 1]), tuple(shares[: count + 1]))


def _drawn(each: HeadInput, shares: list[float], accepted: float, tokens: list[float], mass: float) -> HeadOutput:
    """One sequence that samples, from ``verify``'s results."""
    if any(share != share for share in shares):  # as for greedy rows: a single -inf is a token that cannot be chosen
        return HeadOutput(finite=False)
    if not _emits(each, shares[-1]):
        return HeadOutput()
    check_mass(mass)
    count = int(accepted) + 1
    return HeadOutput(tuple(int(token) for token in tokens[:count]), tuple(shares[:count]))


def _spans(inputs: Sequence[HeadInput]) -> list[slice]:
    """Where each row's tokens are among all."""
    ends = list(accumulate(each.tokens for each in inputs))
    return [slice(end - each.tokens, end) for each, end in zip(inputs, ends, strict=True)]


def _rows(tensor: Tensor, inputs: Sequence[HeadInput], wanted: Sequence[bool]) -> Tensor:
    """The tokens of some rows, ``[tokens, ...]``."""
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
