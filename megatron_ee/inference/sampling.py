"""From logits to a token: distributions, random numbers, draws, and the rule that makes speculation lossless.

Everything here is a function of its arguments alone. Logits are float32 ``[rows, V]``, each row those of one position
over the whole vocabulary; what may not be chosen (a padded row of the vocabulary) is -inf. Rows do not depend on each
other, and one that holds NaN gives tokens without a meaning. Nothing here waits for the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, field_validator
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.validation import Strict
from megatron_ee.errors import shown

MAX_SEED = 2**63 - 1  # travels between ranks as an int64
# Beyond these, float32 logits overflow or all become equal.
_TEMPERATURES = (1e-6, 1e6)
_PENALTIES = (1e-3, 1e3)
SORTED_ROWS = 32
"""Rows whose whole vocabulary is sorted at a time: that takes some 30 bytes for each logit."""


class Sampling(Strict):
    """How a request's tokens are chosen; names and meanings are those of transformers' ``generate``.

    Attributes:
        temperature: divides the logits; 0 is greedy, and then the next three have no effect.
        top_k: only the so many most likely tokens (and their equals) stay; 0 is off.
        top_p: only the most likely tokens that together reach this probability stay; 1 is off.
        min_p: only tokens with at least this share of the largest probability stay; 0 is off.
        repetition_penalty: above 1 makes tokens of the prompt and the output less likely; 1 is off.
        seed: of the request's random numbers.
    """

    temperature: float = 0.0
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=_PENALTIES[0], le=_PENALTIES[1])
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @field_validator("temperature")
    @classmethod
    def _within_float32(cls, value: float) -> float:
        low, high = _TEMPERATURES
        if not (value == 0 or low <= value <= high):
            raise ValueError(f"must be 0 (greedy) or from {low:g} to {high:g}, not {shown(value)}")
        return value

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def penalised(logits: Tensor, seen: Sequence[Collection[int]], penalties: Sequence[float]) -> Tensor:
    """``logits`` with those of the tokens that a row has seen divided by its penalty, negative ones multiplied by it.

    Seen are the prompt's and the output's tokens so far; each counts once, however often it is there. ``logits`` is
    returned itself where nothing changes, and never written into.
    """
    own = [list(set(ids)) if penalty != 1 else [] for ids, penalty in zip(seen, penalties, strict=True)]
    tokens = [token for each in own for token in each]
    if not tokens:
        return logits
    numbered = torch.tensor([range(len(own)), penalties], dtype=torch.float64)
    rows, factors = numbered.repeat_interleave(torch.tensor([len(each) for each in own]), dim=1)
    table = torch.stack((rows, torch.tensor(tokens, dtype=torch.float64), factors))
    rows, ids, factors = platform.to_device(table, logits.device)
    where, factors = (rows.long(), ids.long()), factors.float()
    values = logits[where]
    return logits.index_put(where, torch.where(values < 0, values * factors, values / factors))


def probabilities(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """The distributions ``[rows, V]`` float32 to draw from: temperature, top-k, top-p, min-p, in this order.

    As transformers does it. Tokens that are left out have probability 0; the rest sums to 1. Greedy rows: 1 at the most
    likely token, the lowest id of several. The penalty is not applied here.

    Args:
        logits: at least one of each row finite.
        samplings: of each row.
    """
    size = logits.shape[1]
    at_once = max(1, min(SORTED_ROWS, platform.cached_bytes() // (4 * size)))
    parts = [
        _probabilities(logits[start : start + at_once], samplings[start : start + at_once])
        for start in range(0, len(samplings), at_once)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _probabilities(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    size = logits.shape[1]
    settings = [[s.temperature or 1.0, min(s.top_k, size), s.top_p, s.min_p, s.greedy] for s in samplings]
    columns = _on_device(settings, logits).split(1, dim=1)
    scores = logits / columns[0].float()
    few = [s.top_k for s in samplings if 0 < s.top_k < size]
    if few:
        best = torch.topk(scores, max(few)).values
        top_k = columns[1].long()
        least = best.gather(1, top_k.clamp(1, max(few)) - 1)
        scores = scores.masked_fill((scores < least) & (0 < top_k) & (top_k < size), -torch.inf)
    if any(s.top_p < 1 for s in samplings):
        scores = scores.masked_fill(_outside_nucleus(scores, columns[2]), -torch.inf)
    if any(s.min_p > 0 for s in samplings):
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < columns[3].float() * p.amax(-1, keepdim=True), -torch.inf)
    p = scores.softmax(-1)
    if any(s.greedy for s in samplings):
        certain = torch.zeros_like(p).scatter(1, logits.argmax(-1, keepdim=True), 1.0)
        p = torch.where(columns[4] > 0, certain, p)
    return p


def _outside_nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """Tokens without which the others still have probability ``top_p`` ``[rows, 1]``, the least likely ones first.

    Returns:
        ``[rows, V]`` bool, False in a row whose ``top_p`` is 1.
    """
    p = scores.softmax(-1)
    rest = torch.where(top_p < 1, 1 - top_p, -1).float()
    if platform.queues_work(scores.device):
        return _least_likely(scores, p, rest)
    # Sorting a whole vocabulary takes a CPU as long as several layers. All tokens below this have less than half of
    # ``rest`` together, so the border lies among the others.
    near = p >= p.amax(-1, keepdim=True).clamp(max=0.5 * rest / p.shape[1])
    outside = ~near
    for row in (rest >= 0).squeeze(1).nonzero().squeeze(1).tolist():
        ids = near[row].nonzero().squeeze(1)[None]
        left = rest[row, None] - p[row].masked_fill(near[row], 0).sum()
        outside[row, ids[0]] = _least_likely(scores[row][ids], p[row][ids], left)[0]
    return outside


def _least_likely(scores: Tensor, p: Tensor, rest: Tensor) -> Tensor:
    """Which tokens ``[rows, ids]`` have, the least likely ones first, at most ``rest`` ``[rows, 1]`` together.

    Of equally likely tokens the lowest ids stay, on every machine (transformers leaves that to the sort). The most
    probable token always stays.
    """
    order = torch.sort(scores, descending=True, stable=True).indices.flip(-1)
    sorted_out = p.gather(-1, order).cumsum(-1) <= rest
    sorted_out[:, -1:].zero_()
    return torch.zeros_like(sorted_out).scatter(-1, order, sorted_out)


def _on_device(numbers: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """A table of numbers where another tensor is, float64: it holds ids too."""
    return platform.to_device(torch.tensor(numbers, dtype=torch.float64), like.device)


def uniform(seed: int, position: int, purpose: str) -> float:
    """A random number in [0, 1) of 53 bits that depends on its arguments alone, the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {position} {purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of ``p`` ``[rows, V]`` that the random numbers ``u`` ``[rows]`` float64 in [0, 1) stand for.

    Never one of probability zero, whatever is rounded.

    Returns:
        The tokens ``[rows]`` int64, and each row's sum ``[rows]`` float64: where that is not positive and finite, ``p``
        is no distribution, and its token means nothing; see ``check_mass``.
    """
    sums = p.cumsum(-1, dtype=torch.float64)
    # A parallel scan may round sums up and down again, so what has no probability is taken out, not relied upon.
    sums = sums.masked_fill(p == 0, 0.0)
    total = sums.amax(-1, keepdim=True)
    # u < 1 keeps u * total below total, which is one of the sums: there is always a first one above it.
    first = (sums > u[:, None] * total).to(torch.uint8).argmax(-1)
    return first, total[:, 0]


def check_mass(mass: float) -> None:
    """Raise a ``ValueError`` where the sum that ``draw`` gave is not that of a distribution."""
    if not 0 < mass < torch.inf:
        raise ValueError(f"not a distribution: its probabilities sum to {mass}")


@dataclass(frozen=True)
class Proposals:
    """The proposals for one row, which ``verify`` is to judge.

    Attributes:
        tokens: the proposals, each drawn with ``uniform(seed, its position, "draft")``; none where a token is drawn
            alone.
        seed: the request's.
        position: of the first proposal in the request's sequence.
        purpose: what the random number of the token after all proposals is for.
    """

    tokens: Sequence[int]
    seed: int
    position: int
    purpose: str = "target"


def verify(target: Tensor, draft: Tensor, drafts: Sequence[Proposals]) -> tuple[Tensor, Tensor, Tensor]:
    """Accept or replace drafted tokens so that what comes out is distributed as ``target`` has it.

    The rule of arXiv 2211.17192 and 2302.01318: proposal i is accepted with probability min(1, p(x)/q(x)). The first
    that is rejected is replaced by a token drawn from max(0, p - q). Where all are accepted, one more is drawn from the
    target. With greedy distributions this compares tokens.

    Args:
        target: distributions p of the full model: of each row with d proposals d + 1, the last one after all of them.
        draft: distributions q that the proposals were drawn from, ``[proposals of all rows, V]``.
        drafts: of each row.

    Returns:
        The number n of accepted proposals, ``[rows]`` int64; the tokens, ``[rows, most proposals + 1]`` int64, of
        which the first n are proposals and the next one follows them; and the sum of the distribution that this one was
        drawn from, as ``draw`` gives it.
    """
    longest = max(len(each.tokens) for each in drafts)
    if longest == 0:  # nothing to judge: each row's token is drawn from the target
        numbers = _on_device([[uniform(each.seed, each.position, each.purpose)] for each in drafts], target)
        token, mass = draw(target, numbers[:, 0])
        return torch.zeros_like(token), token[:, None], mass
    table, p_row, q_row = [], 0, 0
    for each in drafts:
        count, start = len(each.tokens), each.position
        padding = longest - count
        accept = [uniform(each.seed, start + index, "accept") for index in range(count)]
        follow = [uniform(each.seed, start + index, "resample") for index in range(count)]
        follow.append(uniform(each.seed, start + count, each.purpose))
        # Where there is no proposal an infinite number accepts none.
        padded = [*each.tokens, *[0] * padding, *accept, *[torch.inf] * padding, *follow, *[0.0] * padding]
        table.append([p_row, q_row, count, *padded])
        p_row, q_row = p_row + count + 1, q_row + count
    sizes = [1, 1, 1, longest, longest, longest + 1]
    p_start, q_start, counts, ids, accept_u, follow_u = _on_device(table, target).split(sizes, dim=1)
    p_start, q_start, counts, ids = (each.long() for each in (p_start, q_start, counts, ids))
    steps = torch.arange(longest, device=target.device)
    p_ids = target[(p_start + steps).clamp(max=len(target) - 1), ids]
    q_ids = draft[(q_start + steps).clamp(max=len(draft) - 1), ids]
    # In this form nothing is divided: p = 0 is never accepted, p >= q always is.
    accepts = accept_u * q_ids < p_ids
    accepted = accepts.long().cumprod(1).sum(1, keepdim=True)
    p = target[(p_start + accepted)[:, 0]]
    q = draft[(q_start + accepted).clamp(max=len(draft) - 1)[:, 0]]
    left = (p - torch.where(accepted < counts, q, 0)).clamp_(min=0)
    # Where p and q differ by rounding alone, nothing may be left; the target is then as good.
    left = torch.where(left.sum(1, keepdim=True) > 0, left, p)
    token, mass = draw(left, follow_u.gather(1, accepted)[:, 0])
    tokens = torch.cat((ids, ids.new_zeros(len(ids), 1)), 1).scatter(1, accepted, token[:, None])
    return accepted[:, 0], tokens, mass
