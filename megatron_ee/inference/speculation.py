"""How far to draft, and at which exit: chosen online from acceptance and measured time.

A round runs the newest token through the layers up to the drafting exit k and asks it for the next, and so on; then
all tokens of the round run through the other layers in one pass, which verifies the proposals (Leviathan et al., arXiv
2211.17192). A proposal that is not likely enough to be accepted is not made: the round ends there. Whatever is chosen,
the output is the full model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from megatron_ee.inference.policy import backoff_length

K = TypeVar("K")

DEFAULT_LENGTH = 3
"""Proposals per round where tokens are sampled and the request does not say."""
MAX_LENGTH = 15
"""Longest draft that is chosen: 16 tokens are verified together, which is what tiles take at a time. Only text that
repeats itself has drafts of that length accepted."""
BINS = 10
PRIOR = 4.0
"""Observations that the prior counts for: that a proposal is accepted as often as its exit is confident."""
MEMORY = 0.97
"""Weight of an observation after the next one: the text changes, and with it what the exits know."""
TRIALS = 3
"""Rounds that each choice is given at first, and drafts at the beginning of each sequence."""
EXPLORE = 24
"""Rounds after which one of the choices that are not the best is tried again: each in turn."""
SMOOTH = 0.2


@dataclass
class Costs:
    """Measured seconds of passes from the first layer to a head, by depth and number of tokens.

    Attributes:
        head_layers: how many layers the head at each depth costs; used until it has been measured.
    """

    head_layers: Mapping[int, float]
    _seen: dict[tuple[int, int], float] = field(default_factory=dict)
    _layer: dict[int, float] = field(default_factory=dict)

    def observe(self, stop: int, tokens: int, seconds: float) -> None:
        """One pass took so long."""
        size = bucket(tokens)
        _smooth(self._seen, (stop, size), seconds)
        _smooth(self._layer, size, seconds / (stop + self.head_layers[stop]))

    def seconds(self, stop: int, tokens: int) -> float:
        """How long a pass takes; 0 before anything has been measured."""
        size = bucket(tokens)
        found = self._seen.get((stop, size))
        if found is not None or not self._layer:
            return found or 0.0
        # A size that was not measured yet takes the nearest one.
        nearest = min(self._layer, key=lambda other: (abs(other - size), other))
        return self._layer[nearest] * (stop + self.head_layers[stop])


@dataclass
class Acceptance:
    """How often the proposals of one exit are accepted, by its confidence in them."""

    accepted: list[float] = field(default_factory=lambda: [PRIOR * (bin_ + 0.5) / BINS for bin_ in range(BINS)])
    judged: list[float] = field(default_factory=lambda: [PRIOR] * BINS)

    def observe(self, confidence: float, accepted: bool) -> None:
        """One token that the exit proposed, or would have, was judged."""
        bin_ = _bin(confidence)
        self.accepted[bin_] = MEMORY * self.accepted[bin_] + accepted
        self.judged[bin_] = MEMORY * self.judged[bin_] + 1

    def rate(self, confidence: float) -> float:
        """Share of accepted proposals among those of about this confidence."""
        bin_ = _bin(confidence)
        return self.accepted[bin_] / self.judged[bin_]


@dataclass(frozen=True)
class Plan:
    """A round of speculative mode.

    Attributes:
        exit: layer of the drafting exit; 0 for none.
        length: most proposals; 0 for none.
        min_chance: a proposal is not worth its time where the chance that it and all before it are accepted is below.
    """

    exit: int = 0
    length: int = 0
    min_chance: float = 0.0


@dataclass
class _Record:
    """Tokens that rounds of one kind brought, and seconds that they took.

    Rounds count less the more rounds of any kind came after them, so that one that is tried again counts as new.
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
    """What is known of the exits, from all sequences.

    Attributes:
        costs: of passes.
        acceptance: by layer of the exit.
    """

    costs: Costs
    acceptance: dict[int, Acceptance]
    _records: dict[tuple[int, int], _Record] = field(default_factory=dict)
    _times: dict[tuple[int, int, int], float] = field(default_factory=dict)
    _rounds: int = 0

    def plan(self, exits: Sequence[int], rows: int, length: int | None = None, *, may_skip: bool = True) -> Plan:
        """The next round of a sequence.

        Args:
            exits: layers that may draft.
            rows: sequences that share the passes.
            length: proposals that the request wants; None leaves it open, each proposal to be worth its time.
            may_skip: whether a round without proposals may be chosen.
        """
        size = bucket(rows)
        choices = [*exits, *([0] if may_skip and length is None else [])]
        records = {layer: self._records.setdefault((layer, size), _Record()) for layer in choices}
        new = [layer for layer in choices if records[layer].rounds < TRIALS]
        stale = [layer for layer in choices if self._rounds - records[layer].last > EXPLORE * (len(choices) - 1)]
        best = max(choices, key=lambda layer: records[layer].rate)
        layer = (new or stale or [best])[0]
        if layer == 0:
            return Plan()
        if length is not None:
            return Plan(layer, length)
        # A proposal brings its chance of being accepted, for the time of one more token through the exit.
        plain = self._records.get((0, size), _Record())
        return Plan(layer, MAX_LENGTH, self.costs.seconds(layer, rows) * max(records[best].rate, plain.rate))

    def learn(self, plan: Plan, rows: int, proposals: int, tokens: int, seconds: float) -> None:
        """A round of so many proposals brought so many tokens, in a sequence's share of the time.

        The smoothed time of such rounds counts; the first of each size is often slow (kernels chosen, code compiled)
        and does not count at all.
        """
        self._rounds += 1
        record = self._records.setdefault((plan.exit, bucket(rows)), _Record())
        size = (plan.exit, bucket(rows), bucket(proposals + 1))
        known = size in self._times
        _smooth(self._times, size, seconds)
        if known:
            record.add(tokens, self._times[size], self._rounds)


class DraftState:
    """Speculative mode's state of one sequence: the round in work, and whether its drafts have been of use.

    Attributes:
        num_rounds: rounds judged so far.
        plan: of the round in work; None between rounds.
        num_failed_rounds: drafted rounds in a row of which nothing was accepted.
        rounds_to_skip: rounds that are to run without a draft because of that.
    """

    def __init__(
        self, drafter: Drafter, exits: Sequence[int], fixed: tuple[int | None, int | None], greedy: bool
    ) -> None:
        """Nothing drafted yet.

        Args:
            drafter: shared by all sequences.
            exits: layers that may draft.
            fixed: drafting exit and length that the request wants; None leaves them open.
            greedy: whether the most probable token is always taken.
        """
        self._drafter, self._exits, self._fixed, self._greedy = drafter, tuple(exits), fixed, greedy
        self.num_rounds = self.num_failed_rounds = self.rounds_to_skip = 0
        self.plan: Plan | None = None
        self._rows, self._started, self._seconds = 1, 0.0, 0.0
        self._confidences: list[float] = []  # of the proposals
        self._unproposed: tuple[int, float] | None = None  # token after them that was not worth it, with its confidence

    @property
    def plan_exit(self) -> int:
        """Layer of the exit that drafts in this round."""
        return 0 if self.plan is None else self.plan.exit

    @property
    def plan_length(self) -> int:
        """Proposals that are to be made in this round."""
        return 0 if self.plan is None else self.plan.length

    @property
    def plans_by_time(self) -> bool:
        """Whether the time of passes decides on the drafts."""
        return self._greedy and not (self._fixed[1] is not None and len(self._exits) == 1)

    @property
    def _may_skip(self) -> bool:
        """Whether rounds without drafts may be chosen: timing may decide, and the request does not."""
        return self._greedy and self._fixed == (None, None)

    @property
    def _backs_off(self) -> bool:
        """Whether so many rounds in a row have failed that rounds without drafts come between them."""
        return self._may_skip and backoff_length(self.num_failed_rounds) > 0

    def begin_round(self, rows: int, now: float, max_length: int) -> None:
        """Plan the next round, unless one is in work.

        Args:
            rows: sequences that share its passes.
            now: seconds of some clock.
            max_length: most proposals that there is room for.
        """
        if self.plan is not None:
            return
        exits, length = self._exits, self._fixed[1]
        if not self._greedy:  # what is drawn depends on the draft: timing must not decide on it
            exits, length = exits[:1], DEFAULT_LENGTH if length is None else length
        if length is not None and len(exits) == 1:
            plan = Plan(exits[0], length)
        elif self._backs_off and self.rounds_to_skip > 0:
            plan, self.rounds_to_skip = Plan(), self.rounds_to_skip - 1
        elif self._backs_off:  # each exit in turn: another one may do better on this text
            plan = self._drafter.plan([exits[self.num_failed_rounds % len(exits)]], rows, may_skip=False)
        else:
            # The text of other sequences says little about this one's, so it begins with drafts.
            may_skip = self._may_skip and self.num_rounds >= TRIALS
            plan = self._drafter.plan(exits, rows, length, may_skip=may_skip)
        if plan.length > max_length:
            plan = Plan(plan.exit, max_length, plan.min_chance) if max_length > 0 else Plan()
        self.plan, self._rows, self._started, self._seconds = plan, rows, now, 0.0

    def add_seconds(self, seconds: float) -> None:
        """The sequence's share of a pass of this round."""
        self._seconds += seconds

    def elapsed(self, now: float) -> float:
        """Seconds since the round began, for all its sequences; ``set_seconds`` takes what every rank agrees on."""
        return now - self._started

    def set_seconds(self, seconds: float) -> None:
        """The round took so long, for all its sequences."""
        self._seconds = seconds / self._rows

    def propose(self, token: int, confidence: float) -> bool:
        """Whether a token of the drafting exit is proposed; if not, the draft ends before it."""
        assert self.plan is not None
        if self.plan.min_chance > 0:
            acceptance, chance = self._drafter.acceptance[self.plan.exit], 1.0
            for each in (*self._confidences, confidence):
                chance *= acceptance.rate(each)
            if chance < self.plan.min_chance:
                self._unproposed = (token, confidence)
                return False
        self._confidences.append(confidence)
        return True

    def end_round(self, emitted: Sequence[int]) -> tuple[int, int]:
        """Learn from what the full model emitted: accepted proposals and one more token.

        Returns:
            The number of proposals that were judged, and of those that were accepted.
        """
        assert self.plan is not None
        accepted, made, backed_off = len(emitted) - 1, len(self._confidences), self._backs_off
        judged = min(accepted + 1, made)
        self.num_rounds += 1
        if self.plan.exit:
            self.num_failed_rounds = 0 if accepted else self.num_failed_rounds + 1
            self.rounds_to_skip = backoff_length(self.num_failed_rounds)
            acceptance = self._drafter.acceptance[self.plan.exit]
            for number in range(judged):
                acceptance.observe(self._confidences[number], number < accepted)
            if self._unproposed is not None and accepted == made:
                acceptance.observe(self._unproposed[1], self._unproposed[0] == emitted[-1])
        # A sequence that backs off says little about others: its exits know nothing of its text.
        if self._seconds > 0 and (accepted or not backed_off):
            self._drafter.learn(self.plan, self._rows, made, len(emitted), self._seconds)
        self.abort_round()
        return judged, accepted

    def abort_round(self) -> None:
        """Forget the round in work."""
        self.plan, self._confidences, self._unproposed = None, [], None


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
