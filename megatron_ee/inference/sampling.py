"""From logits to a token: distributions, random numbers, draws, and the rule that makes speculation lossless.

Everything here is a function of its arguments alone. Logits are those of one position, [V] float32 over the whole
vocabulary; what may not be chosen (a padded row of the vocabulary) is -inf. NaN must have been refused before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from megatron_ee.errors import ConfigError, shown

MAX_SEED = 2**63 - 1  # travels between ranks as an int64
# Beyond these, float32 logits overflow or all become equal.
_TEMPERATURES = (1e-6, 1e6)
_PENALTIES = (1e-3, 1e3)


@dataclass(frozen=True)
class Sampling:
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
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    def check(self) -> None:
        """Check types and ranges.

        Raises:
            ConfigError: one line that begins with the field's name.
        """
        low, high = _TEMPERATURES
        value = _number("temperature", self.temperature)
        if not (value == 0 or low <= value <= high):
            raise ConfigError(
                f"temperature: must be 0 (greedy) or lie between {low:g} and {high:g}, not {shown(self.temperature)}"
            )
        if _integer("top_k", self.top_k) < 0:
            raise ConfigError(f"top_k: must be at least 0 (off), not {shown(self.top_k)}")
        if not 0 < _number("top_p", self.top_p) <= 1:
            raise ConfigError(f"top_p: must be above 0 and at most 1 (off), not {shown(self.top_p)}")
        if not 0 <= _number("min_p", self.min_p) <= 1:
            raise ConfigError(f"min_p: must lie between 0 (off) and 1, not {shown(self.min_p)}")
        low, high = _PENALTIES
        if not low <= _number("repetition_penalty", self.repetition_penalty) <= high:
            raise ConfigError(
                f"repetition_penalty: must lie between {low:g} and {high:g} (1: off), not "
                f"{shown(self.repetition_penalty)}"
            )
        if not 0 <= _integer("seed", self.seed) <= MAX_SEED:
            raise ConfigError(f"seed: must lie between 0 and {MAX_SEED}, not {shown(self.seed)}")


def _number(name: str, value: object) -> float:
    """``value`` as a finite float; ConfigError where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}: must be a number, not {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise ConfigError(f"{name}: is too large a number") from None
    if not isfinite(number):
        raise ConfigError(f"{name}: must be a finite number, not {number}")
    return number


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}: must be a whole number, not {shown(value)}")
    return value


def penalised(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """``logits`` [V] with those of the tokens ``seen`` divided by ``penalty``, negative ones multiplied by it.

    Seen are the prompt's and the output's tokens so far; each counts once, however often it is there. ``logits`` is
    returned itself where nothing changes, and never written into.
    """
    if penalty == 1 or not seen:
        return logits
    ids = torch.tensor(list(seen), device=logits.device)
    values = logits[ids]
    return logits.index_copy(0, ids, torch.where(values < 0, values * penalty, values / penalty))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [V] float32 to draw from: temperature, top-k, top-p, min-p, in this order, as transformers.

    Tokens that are left out have probability 0; the rest sums to 1. Greedy: 1 at the most likely token, the lowest id
    of several. The penalty is not applied here.

    Args:
        logits: [V] float32, at least one of them finite.
        sampling: as ``Sampling.check`` lets pass.
    """
    if sampling.greedy:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    scores = logits / sampling.temperature
    if 0 < sampling.top_k < scores.numel():
        least = torch.topk(scores, sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        scores = scores.index_fill(0, _outside_nucleus(scores, sampling.top_p), -torch.inf)
    if sampling.min_p > 0:
        p = scores.softmax(0)
        scores = scores.masked_fill(p < sampling.min_p * p.max(), -torch.inf)
    return scores.softmax(0)


def _outside_nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Ids of tokens without which the others still have probability ``top_p``, the least likely ones first.

    Some ids that are outside beyond doubt come unsorted: sorting a whole vocabulary takes as long as several layers.
    """
    p = scores.softmax(0)
    rest = 1 - top_p
    # All tokens below this have less than half of ``rest`` together, so the border lies among the others.
    doubtful = p >= p.max().clamp(max=0.5 * rest / p.numel())
    ids = doubtful.nonzero().squeeze(1)
    surely = p.masked_fill(doubtful, 0).sum()
    # Of equals the lowest ids stay, on every machine (transformers leaves that to the sort's whims).
    order = torch.sort(scores[ids], descending=True, stable=True).indices.flip(0)
    outside = surely + p[ids[order]].cumsum(0) <= rest
    outside[-1] = False  # the most likely token always stays
    return torch.cat([(~doubtful).nonzero().squeeze(1), ids[order][outside]])


def uniform(seed: int, position: int, purpose: str) -> float:
    """A random number in [0, 1) of 53 bits that depends on its arguments alone, the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {position} {purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(p: Tensor, u: float) -> int:
    """The token of ``p`` [V] (any positive sum) that the random number ``u`` in [0, 1) stands for.

    Never one of probability zero, whatever is rounded.

    Raises:
        ValueError: ``p`` holds NaN or nothing positive.
    """
    sums = p.cumsum(0, dtype=torch.float64)
    # A parallel scan may round sums up and down again, so what has no probability is taken out, not relied upon.
    sums = sums.masked_fill(p == 0, 0.0)
    total = sums.max()
    # u < 1 keeps u * total below total, which is one of the sums: there is always a first one above it.
    first = (sums > u * total).to(torch.uint8).argmax()
    token, mass = torch.stack([first.double(), total]).tolist()  # one transfer
    if not 0 < mass < torch.inf:
        raise ValueError(f"not a distribution: its probabilities sum to {mass}")
    return int(token)


def verify(target: Tensor, draft: Tensor, tokens: Sequence[int], seed: int, position: int) -> tuple[int, int]:
    """Accept or replace drafted tokens so that what comes out is distributed as ``target`` has it.

    The rule of arXiv 2211.17192 and 2302.01318: proposal i stands with probability min(1, p(x)/q(x)); in place of the
    first that does not, a token is drawn from max(0, p - q); where all stand, one more is drawn from the target. With
    greedy distributions that is to compare tokens.

    Args:
        target: [d+1, V] distributions p of the full model, the last one after all proposals.
        draft: [d, V] distributions q that the proposals were drawn from, with ``uniform(seed, position + i, "draft")``.
        tokens: the d proposals.
        seed: the request's.
        position: of the first proposal in the request's sequence.

    Returns:
        The number n of proposals that stand, and the token that follows them, at ``position + n``.
    """
    count = len(tokens)
    if count:
        rows = torch.arange(count, device=target.device)
        ids = torch.tensor(tokens, device=target.device)
        pairs = torch.stack([target[rows, ids], draft[rows, ids]], dim=1).tolist()
        for index, (p, q) in enumerate(pairs):
            # In this form nothing is divided: p = 0 never stands, p >= q always does.
            if not uniform(seed, position + index, "accept") * q < p:
                return index, _replacement(target[index], draft[index], seed, position + index)
    return count, draw(target[count], uniform(seed, position + count, "target"))


def _replacement(p: Tensor, q: Tensor, seed: int, position: int) -> int:
    left = (p - q).clamp_(min=0)
    u = uniform(seed, position, "resample")
    # Where p and q differ by rounding alone, nothing may be left; the target is then as good.
    return draw(torch.where(left.sum() > 0, left, p), u)
