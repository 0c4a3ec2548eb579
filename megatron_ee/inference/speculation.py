"""How far to draft, and at which exit: chosen online from what turns out to stand and from measured time.

A round runs the newest token through the layers up to the drafting exit k and asks it for the next, and so on; then
all tokens of the round run through the other layers in one pass, which says which proposals stand (Leviathan et al.,
arXiv 2211.17192). A proposal that is not likely enough to stand is not made: the round ends there. Whatever is chosen,
the output is the full model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

K = TypeVar("K")

MAX_LENGTH = 15
"""Longest draft that is chosen: 16 tokens are verified together, which is what tiles take at a time. Text that repeats
itself has drafts stand that long; elsewhere none is."""
BINS = 10
PRIOR = 4.0
"""Observations that the prior counts for: that a proposal stands as often as its exit is sure of it."""
MEMORY = 0.97
"""What an observation still counts for after the next: the text changes, and with it what the exits know."""
TRIALS = 3
"""Rounds that each choice is given at first, and drafts at the beginning of each row."""
EXPLORE = 24
"""Rounds after which one of the choices that are not the best is tried again: each in turn."""
SMOOTH = 0.2


@dataclass
class Costs:
    """Measured seconds of chains that start from tokens, by stop and number of tokens, the head there asked.

    Attributes:
        head_layers: how many layers the head at each place is worth; only until it has been measured.
    """

    head_layers: Mapping[int, float]
    _seen: dict[tuple[int, int], float] = field(default_factory=dict)
    _layer: dict[int, float] = field(default_factory=dict)

    def observe(self, stop: int, tokens: int, seconds: float) -> None:
        """One chain took so long."""
        size = bucket(tokens)
        _smooth(self._seen, (stop, size), seconds)
        _smooth(self._layer, size, seconds / (stop + self.head_layers[stop]))

    def seconds(self, stop: int, tokens: int) -> float:
        """How long one takes; 0 before anything has been measured."""
        size = bucket(tokens)
        found = self._seen.get((stop, size))
        if found is not None or not self._layer:
            return found or 0.0
        # Sizes that were not seen yet are taken for the nearest.
        nearest = min(self._layer, key=lambda other: (abs(other - size), other))
        return self._layer[nearest] * (stop + self.head_layers[stop])


@dataclass
class Acceptance:
    """How often the proposals of one exit stand, by how sure it was of them."""

    stood: list[float] = field(default_factory=lambda: [PRIOR * (bin_ + 0.5) / BINS for bin_ in range(BINS)])
    tried: list[float] = field(default_factory=lambda: [PRIOR] * BINS)

    def observe(self, confidence: float, stood: bool) -> None:
        """One proposal that was judged, made or not: those after the first that fell were not."""
        bin_ = _bin(confidence)
        self.stood[bin_] = MEMORY * self.stood[bin_] + stood
        self.tried[bin_] = MEMORY * self.tried[bin_] + 1

    def of(self, confidence: float) -> float:
        """Share that stands of those it was as sure of."""
        bin_ = _bin(confidence)
        return self.stood[bin_] / self.tried[bin_]


@dataclass(frozen=True)
class Plan:
    """A round.

    Attributes:
        exit: layer of the drafting exit; 0 for none.
        length: most proposals; 0 for none.
        worth: chance of standing, with all before it, below which a proposal is not worth its time.
    """

    exit: int = 0
    length: int = 0
    worth: float = 0.0


@dataclass
class _Record:
    """Tokens that rounds of one kind brought, and seconds that they took.

    A round counts for the less the more there were since, of any kind: what one that is tried again brings is new.
    """

    rounds: int = 0
    last: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float, now: int) -> None:
        left = MEMORY ** (now - self.last)
        self.rounds, self.last = self.rounds + 1, now
        self.tokens = left * self.tokens + tokens
        self.seconds = left * self.seconds + seconds

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Drafter:
    """What is known of the exits, from all rows.

    Attributes:
        costs: of chains.
        acceptance: by layer of the exit.
    """

    costs: Costs
    acceptance: dict[int, Acceptance]
    _records: dict[tuple[int, int], _Record] = field(default_factory=dict)
    _times: dict[tuple[int, int, int], float] = field(default_factory=dict)
    _rounds: int = 0

    def plan(self, exits: Sequence[int], rows: int, length: int | None = None, *, may_rest: bool = True) -> Plan:
        """The next round of a row.

        Args:
            exits: layers that may draft.
            rows: that share the passes.
            length: proposals that the request wants; None leaves it open, with each proposal to be worth it.
            may_rest: whether a round without proposals may be chosen.
        """
        size = bucket(rows)
        choices = [*exits, *([0] if may_rest and length is None else [])]
        records = {layer: self._records.setdefault((layer, size), _Record()) for layer in choices}
        new = [layer for layer in choices if records[layer].rounds < TRIALS]
        stale = [layer for layer in choices if self._rounds - records[layer].last > EXPLORE * (len(choices) - 1)]
        best = max(choices, key=lambda layer: records[layer].rate)
        layer = (new or stale or [best])[0]
        if layer == 0:
            return Plan()
        if length is not None:
            return Plan(layer, length)
        # A proposal brings its chance of standing, for the time of one more token through the exit.
        plain = self._records.get((0, size), _Record())
        return Plan(layer, MAX_LENGTH, self.costs.seconds(layer, rows) * max(records[best].rate, plain.rate))

    def learn(self, plan: Plan, rows: int, proposals: int, tokens: int, seconds: float) -> None:
        """A round of so many proposals brought so many tokens, in a row's share of the time.

        What counts is how long such a round takes as a rule; the first of each size is often slow (kernels chosen,
        code compiled) and does not count at all.
        """
        self._rounds += 1
        record = self._records.setdefault((plan.exit, bucket(rows)), _Record())
        size = (plan.exit, bucket(rows), bucket(proposals + 1))
        known = size in self._times
        _smooth(self._times, size, seconds)
        if known:
            record.add(tokens, self._times[size], self._rounds)


def bucket(tokens: int) -> int:
    """Sizes that cost about the same: each number up to 4, then powers of two and the numbers halfway between."""
    if tokens <= 4:
        return tokens
    size = 1 << (tokens - 1).bit_length()
    return size if tokens > size * 3 // 4 else size * 3 // 4


def _bin(confidence: float) -> int:
    return min(BINS - 1, max(0, int(confidence * BINS)))


def _smooth(table: dict[K, float], key: K, value: float) -> None:
    old = table.get(key)
    # The first one is often slow (caches, kernels chosen): faster ones count at once, and slower ones by and by.
    table[key] = value if old is None or value < 0.7 * old else old + SMOOTH * (min(value, 2 * old) - old)
