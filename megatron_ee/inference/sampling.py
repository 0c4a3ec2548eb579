"""Sampling: distributions, random numbers, draws, and lossless verification of drafts.

All functions are pure. Logits are float32 ``[rows, V]``: one row per position, over the whole vocabulary. Logits of
tokens that cannot be chosen (padding of the vocabulary) are -inf. Rows are independent. The tokens of a row with NaN
have no meaning. On a GPU, no function synchronises with the device.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, field_validator
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.validation import Strict
from megatron_ee.errors import shown

MAX_SEED = 2**63 - 1  # seeds are sent between ranks as int64
# Outside these ranges, float32 logits overflow or become equal.
_TEMPERATURES = (1e-6, 1e6)
_PENALTIES = (1e-3, 1e3)
_MOST_SUBTRACTED = 2.0  # OpenAI's limit
SORTED_ROWS = 32
"""Maximum rows whose vocabulary is sorted at a time; sorting takes about 30 bytes per logit."""


class Sampling(Strict):
    """Sampling settings of a request, with the names and meanings of ``generate`` in transformers.

    Attributes:
        temperature: divides the logits; 0 is greedy, and top_k, top_p and min_p then have no effect.
        top_k: keep only this many most likely tokens, and tokens as likely as the last of them; 0 is off.
        top_p: keep only the most likely tokens whose total probability reaches this; 1 is off.
        min_p: keep only tokens with at least this share of the largest probability; 0 is off.
        repetition_penalty: a value above 1 makes tokens of the prompt and the output less likely; 1 is off.
        frequency_penalty: subtracted from a token's logit for each time that the output has it; 0 is off. This and the
            next have OpenAI's names and meanings.
        presence_penalty: subtracted from a token's logit if the output has it; 0 is off.
        seed: seed of the request's random numbers.
    """

    temperature: float = 0.0
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=_PENALTIES[0], le=_PENALTIES[1])
    frequency_penalty: float = Field(default=0.0, ge=-_MOST_SUBTRACTED, le=_MOST_SUBTRACTED)
    presence_penalty: float = Field(default=0.0, ge=-_MOST_SUBTRACTED, le=_MOST_SUBTRACTED)
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
        """Whether the most likely token is always chosen."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether the tokens before a position change its logits."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


def penalised(logits: Tensor, seen: Sequence[Collection[int]], penalties: Sequence[float]) -> Tensor:
    """Apply repetition penalties: divide the logits of seen tokens by the penalty; multiply them if negative.

    Args:
        logits: ``[rows, V]`` float32; not modified.
        seen: per row, token ids of the prompt and the output so far. Repeated ids count once.
        penalties: one per row; 1 is off.

    Returns:
        ``[rows, V]``; ``logits`` itself if nothing changes.
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


def count_penalised(logits: Tensor, outputs: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> Tensor:
    """Apply frequency and presence penalties: subtract from the logits of tokens that the output has.

    Args:
        logits: ``[rows, V]`` float32; not modified.
        outputs: per row, token ids of the output so far.
        samplings: one per row.

    Returns:
        ``[rows, V]``; ``logits`` itself if nothing changes.
    """
    cells = [
        (row, token, sampling.frequency_penalty * count + sampling.presence_penalty)
        for row, (ids, sampling) in enumerate(zip(outputs, samplings, strict=True))
        if sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
        for token, count in Counter(ids).items()
    ]
    if not cells:
        return logits
    rows, ids, amounts = platform.to_device(torch.tensor(cells, dtype=torch.float64), logits.device).unbind(1)
    return logits.index_put((rows.long(), ids.long()), -amounts.float(), accumulate=True)


def probabilities(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """The distributions to draw from: temperature, top-k, top-p, then min-p, as in transformers.

    Removed tokens have probability 0; the others sum to 1. A greedy row has probability 1 at the most likely token
    (the lowest id if there are several). Penalties are not applied here.

    Args:
        logits: ``[rows, V]`` float32, with at least one finite value per row.
        samplings: one per row.

    Returns:
        ``[rows, V]`` float32.
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
    """The tokens that top-p removes: the least likely ones, as long as the others have probability ``top_p``.

    Args:
        scores: logits ``[rows, V]``.
        top_p: ``[rows, 1]``.

    Returns:
        ``[rows, V]`` bool; False in a row whose ``top_p`` is 1.
    """
    p = scores.softmax(-1)
    rest = torch.where(top_p < 1, 1 - top_p, -1).float()
    if platform.queues_work(scores.device):
        return _least_likely(scores, p, rest)
    # On a CPU, sorting a whole vocabulary takes as long as several layers. The tokens below this probability have less
    # than half of ``rest`` in total, so all of them are removed and only the others need sorting.
    near = p >= p.amax(-1, keepdim=True).clamp(max=0.5 * rest / p.shape[1])
    outside = ~near
    for row in (rest >= 0).squeeze(1).nonzero().squeeze(1).tolist():
        ids = near[row].nonzero().squeeze(1)[None]
        left = rest[row, None] - p[row].masked_fill(near[row], 0).sum()
        outside[row, ids[0]] = _least_likely(scores[row][ids], p[row][ids], left)[0]
    return outside


def _least_likely(scores: Tensor, p: Tensor, rest: Tensor) -> Tensor:
    """The least likely tokens whose total probability is at most ``rest``, never the most likely token.

    Among equally likely tokens, the highest ids are taken first, on every machine (in transformers this depends on the
    sort).

    Args:
        scores: logits ``[rows, ids]``.
        p: their probabilities ``[rows, ids]``.
        rest: ``[rows, 1]``.

    Returns:
        ``[rows, ids]`` bool.
    """
    order = torch.sort(scores, descending=True, stable=True).indices.flip(-1)
    sorted_out = p.gather(-1, order).cumsum(-1) <= rest
    sorted_out[:, -1:].zero_()
    return torch.zeros_like(sorted_out).scatter(-1, order, sorted_out)


def _on_device(numbers: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """A float64 tensor of ``numbers`` on the device of ``like``. float64 also holds token ids exactly."""
    return platform.to_device(torch.tensor(numbers, dtype=torch.float64), like.device)


def uniform(seed: int, position: int, purpose: str) -> float:
    """A random number in [0, 1) with 53 bits, determined by the arguments and equal on every machine."""
    digest = hashlib.blake2b(f"{seed} {position} {purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    A token of probability 0 is never drawn, whatever the rounding.

    Args:
        p: distributions ``[rows, V]``.
        u: uniform random numbers ``[rows]`` float64 in [0, 1).

    Returns:
        The tokens ``[rows]`` int64, and the sum of each row ``[rows]`` float64. If a sum is not positive and finite,
        its row is not a distribution and the token has no meaning; see ``check_mass``.
    """
    sums = p.cumsum(-1, dtype=torch.float64)
    # A parallel scan may round so that sums are not monotonic, so tokens of probability 0 are excluded explicitly.
    sums = sums.masked_fill(p == 0, 0.0)
    total = sums.amax(-1, keepdim=True)
    # u < 1, so u * total is below the largest sum, and there is always a first sum above it.
    first = (sums > u[:, None] * total).to(torch.uint8).argmax(-1)
    return first, total[:, 0]


def check_mass(mass: float) -> None:
    """Raise a ``ValueError`` if ``mass``, a row sum from ``draw``, is not positive and finite."""
    if not 0 < mass < torch.inf:
        raise ValueError(f"not a distribution: its probabilities sum to {mass}")


@dataclass(frozen=True)
class Proposals:
    """The proposals of one sequence, for ``verify``.

    Attributes:
        tokens: proposals, each drawn with ``uniform(seed, its position, "draft")``; empty to draw a single token.
        seed: seed of the request.
        position: position of the first proposal in the sequence.
        purpose: the argument of ``uniform`` for the token after all proposals.
    """

    tokens: Sequence[int]
    seed: int
    position: int
    purpose: str = "target"


def verify(target: Tensor, draft: Tensor, drafts: Sequence[Proposals]) -> tuple[Tensor, Tensor, Tensor]:
    """Accept or replace drafted tokens so that the result is distributed as ``target``.

    Speculative sampling (arXiv 2211.17192, 2302.01318): proposal x is accepted with probability min(1, p(x)/q(x)). The
    first rejected proposal is replaced by a token drawn from max(0, p - q), normalised. If all are accepted, one more
    token is drawn from the target. With greedy distributions this compares tokens.

    Args:
        target: distributions p of the full model, d + 1 rows per sequence with d proposals.
        draft: distributions q that the proposals were drawn from, ``[proposals of all sequences, V]``.
        drafts: one per sequence.

    Returns:
        The number n of accepted proposals, ``[sequences]`` int64; the tokens, ``[sequences, max proposals + 1]`` int64:
        n proposals, then the token after them, then values without meaning; and the mass of the distribution that the
        token after the proposals was drawn from, ``[sequences]`` float64, see ``draw``.
    """
    longest = max(len(each.tokens) for each in drafts)
    if longest == 0:  # no proposals: draw each token from the target
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
        # Padding: an infinite random number never accepts.
        padded = [*each.tokens, *[0] * padding, *accept, *[torch.inf] * padding, *follow, *[0.0] * padding]
        table.append([p_row, q_row, count, *padded])
        p_row, q_row = p_row + count + 1, q_row + count
    sizes = [1, 1, 1, longest, longest, longest + 1]
    p_start, q_start, counts, ids, accept_u, follow_u = _on_device(table, target).split(sizes, dim=1)
    p_start, q_start, counts, ids = (each.long() for each in (p_start, q_start, counts, ids))
    steps = torch.arange(longest, device=target.device)
    p_ids = target[(p_start + steps).clamp(max=len(target) - 1), ids]
    q_ids = draft[(q_start + steps).clamp(max=len(draft) - 1), ids]
    # u < p/q without division: p = 0 is never accepted, p >= q always is.
    accepts = accept_u * q_ids < p_ids
    accepted = accepts.long().cumprod(1).sum(1, keepdim=True)
    p = target[(p_start + accepted)[:, 0]]
    q = draft[(q_start + accepted).clamp(max=len(draft) - 1)[:, 0]]
    left = (p - torch.where(accepted < counts, q, 0)).clamp_(min=0)
    # If p and q differ only by rounding, max(0, p - q) may be all zero; then draw from the target.
    left = torch.where(left.sum(1, keepdim=True) > 0, left, p)
    token, mass = draw(left, follow_u.gather(1, accepted)[:, 0])
    tokens = torch.cat((ids, ids.new_zeros(len(ids), 1)), 1).scatter(1, accepted, token[:, None])
    return accepted[:, 0], tokens, mass
