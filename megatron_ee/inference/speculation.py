"""Plans speculative decoding: the drafting exit and the draft length, chosen online from acceptance and measured time.

In a round, each token runs the layers up to the drafting exit, which proposes the next token. Then all tokens of the
round run the remaining layers in one pass, which verifies the proposals (Leviathan et al., arXiv 2211.17192). A draft
ends early at a token that is unlikely to be accepted. The output always equals the full model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from megatron_ee.inference.policy import backoff_length

K = TypeVar("K")

DEFAULT_LENGTH = 3
"""Proposals per round with sampling, and before a round has been timed, unless the request sets a length."""
MAX_LENGTH = 15
"""Maximum draft length chosen online: 16 tokens are then verified together, a full matrix tile. Drafts of this length
are accepted in repetitive text only."""
BINS = 10
"""Confidence intervals of ``Acceptance``."""
PRIOR = 4.0
"""Weight of the prior, in observations. The prior acceptance rate of a proposal is its confidence."""
MEMORY = 0.97
"""Decay of past observations per new one, because the text changes."""
TRIALS = 3
"""Initial rounds of each choice, and initial drafted rounds of each sequence."""
EXPLORE = 24
"""Rounds between two retries of a choice that is not the best; the choices take turns."""
SMOOTH = 0.2
"""Weight of a new measurement in a smoothed time."""


@dataclass
class Costs:
    """Measured seconds of passes from the first layer to a head, by depth and number of tokens.

    Attributes:
        head_layers: by depth, the cost of the head in layers. It is used for passes that are not measured yet.
    """

    head_layers: Mapping[int, float]
    _seen: dict[tuple[int, int], float] = field(default_factory=dict)
    _layer: dict[int, float] = field(default_factory=dict)

    def observe(self, stop: int, tokens: int, seconds: float) -> None:
        """Record the duration of one pass."""
        size = bucket(tokens)
        _smooth(self._seen, (stop, size), seconds)
        _smooth(self._layer, size, seconds / (stop + self.head_layers[stop]))

    def seconds(self, stop: int, tokens: int) -> float:
        """Expected seconds of a pass; 0 before any measurement."""
        size = bucket(tokens)
        found = self._seen.get((stop, size))
        if found is not None or not self._layer:
            return found or 0.0
        # Not measured yet: use the nearest measured size.
        nearest = min(self._layer, key=lambda other: (abs(other - size), other))
        return self._layer[nearest] * (stop + self.head_layers[stop])


@dataclass
class Acceptance:
    """Acceptance rate of one exit's proposals, by confidence."""

    accepted: list[float] = field(default_factory=lambda: [PRIOR * (bin_ + 0.5) / BINS for bin_ in range(BINS)])
    judged: list[float] = field(default_factory=lambda: [PRIOR] * BINS)

    def observe(self, confidence: float, accepted: bool) -> None:
        """Record whether the full model agreed with a token of the exit."""
        bin_ = _bin(confidence)
        self.accepted[bin_] = MEMORY * self.accepted[bin_] + accepted
        self.judged[bin_] = MEMORY * self.judged[bin_] + 1

    def rate(self, confidence: float) -> float:
        """Acceptance rate of proposals in the same confidence interval."""
        bin_ = _bin(confidence)
        return self.accepted[bin_] / self.judged[bin_]


@dataclass(frozen=True)
class Plan:
    """The plan of one round of speculative decoding.

    Attributes:
        exit: layer of the drafting exit; 0 for none.
        length: maximum number of proposals; 0 for none.
        min_chance: the draft ends before a token if the estimated probability that it and all proposals before it are
            accepted is below this.
    """

    exit: int = 0
    length: int = 0
    min_chance: float = 0.0


@dataclass
class _Record:
    """Emitted tokens and seconds of one choice's rounds.

    Their weights decay with every round of any choice, so a choice that is retried is judged mostly by its new rounds.
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
    """Chooses drafts from the measurements of all sequences.

    Attributes:
        costs: durations of passes.
        acceptance: acceptance rates, by layer of the exit.
    """

    costs: Costs
    acceptance: dict[int, Acceptance]
    _records: dict[tuple[int, int], _Record] = field(default_factory=dict)
    _times: dict[tuple[int, int, int], float] = field(default_factory=dict)
    _rounds: int = 0

    def plan(self, exits: Sequence[int], num_seqs: int, length: int | None = None, *, may_skip: bool = True) -> Plan:
        """Plan the next round of a sequence.

        Args:
            exits: layers of the exits that may draft.
            num_seqs: number of sequences that share the passes.
            length: draft length of the request; None to choose it by expected gain per time.
            may_skip: whether a round without proposals may be chosen.
        """
        size = bucket(num_seqs)
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
        rate = max(records[best].rate, self._records.get((0, size), _Record()).rate)
        if rate == 0:  # no round has been timed: a long draft could take longer than the rest of a short output
            return Plan(layer, DEFAULT_LENGTH)
        # A proposal gains its acceptance probability in tokens and costs one more pass up to the exit.
        return Plan(layer, MAX_LENGTH, self.costs.seconds(layer, num_seqs) * rate)

    def learn(self, plan: Plan, num_seqs: int, proposals: int, tokens: int, seconds: float) -> None:
        """Record a finished round.

        The first round of each size is ignored because it is often slow (kernel selection, compilation). Later rounds
        count with the smoothed time of their size.

        Args:
            plan: its plan.
            num_seqs: number of sequences that shared the passes.
            proposals: number of proposals made.
            tokens: number of tokens emitted.
            seconds: this sequence's share of the time.
        """
        self._rounds += 1
        record = self._records.setdefault((plan.exit, bucket(num_seqs)), _Record())
        size = (plan.exit, bucket(num_seqs), bucket(proposals + 1))
        known = size in self._times
        _smooth(self._times, size, seconds)
        if known:
            record.add(tokens, self._times[size], self._rounds)


class DraftState:
    """Speculative decoding state of one sequence.

    Attributes:
        num_rounds: number of finished rounds.
        plan: plan of the current round; None between rounds.
        num_failed_rounds: number of consecutive drafted rounds without an accepted proposal.
        rounds_to_skip: number of rounds to run without a draft because of these failures.
    """

    def __init__(
        self, drafter: Drafter, exits: Sequence[int], fixed: tuple[int | None, int | None], greedy: bool
    ) -> None:
        """Create the state before the first round.

        Args:
            drafter: shared by all sequences.
            exits: layers of the exits that may draft.
            fixed: drafting exit and draft length of the request; None for one that is chosen online.
            greedy: whether the request decodes greedily.
        """
        self._drafter, self._exits, self._fixed, self._greedy = drafter, tuple(exits), fixed, greedy
        self.num_rounds = self.num_failed_rounds = self.rounds_to_skip = 0
        self.plan: Plan | None = None
        self._num_seqs, self._started, self._seconds = 1, 0.0, 0.0
        self._confidences: list[float] = []  # of the proposals
        self._unproposed: tuple[int, float] | None = None  # the token at which the draft ended, and its confidence

    @property
    def plan_exit(self) -> int:
        """Layer of the drafting exit in this round; 0 for none."""
        return 0 if self.plan is None else self.plan.exit

    @property
    def plan_length(self) -> int:
        """Maximum number of proposals in this round."""
        return 0 if self.plan is None else self.plan.length

    @property
    def plans_by_time(self) -> bool:
        """Whether drafts are planned from measured time."""
        return self._greedy and not (self._fixed[1] is not None and len(self._exits) == 1)

    @property
    def _may_skip(self) -> bool:
        """Whether rounds without drafts may be chosen: greedy decoding, and the request fixes no exit or length."""
        return self._greedy and self._fixed == (None, None)

    @property
    def _backs_off(self) -> bool:
        """Whether consecutive failed rounds are enough to insert rounds without drafts."""
        return self._may_skip and backoff_length(self.num_failed_rounds) > 0

    def begin_round(self, num_seqs: int, now: float, max_length: int) -> None:
        """Plan the next round, unless a round is running.

        Args:
            num_seqs: number of sequences that share its passes.
            now: current time in seconds.
            max_length: maximum number of proposals.
        """
        if self.plan is not None:
            return
        exits, length = self._exits, self._fixed[1]
        if not self._greedy:  # sampled tokens depend on the draft, which must not depend on timing
            exits, length = exits[:1], DEFAULT_LENGTH if length is None else length
        if length is not None and len(exits) == 1:
            plan = Plan(exits[0], length)
        elif self._backs_off and self.rounds_to_skip > 0:
            plan, self.rounds_to_skip = Plan(), self.rounds_to_skip - 1
        elif self._backs_off:  # exits take turns, since another one may do better on this text
            plan = self._drafter.plan([exits[self.num_failed_rounds % len(exits)]], num_seqs, may_skip=False)
        else:
            # A sequence starts with drafted rounds, because other sequences have different text.
            may_skip = self._may_skip and self.num_rounds >= TRIALS
            plan = self._drafter.plan(exits, num_seqs, length, may_skip=may_skip)
        if plan.length > max_length:
            plan = Plan(plan.exit, max_length, plan.min_chance) if max_length > 0 else Plan()
        self.plan, self._num_seqs, self._started, self._seconds = plan, num_seqs, now, 0.0

    def add_seconds(self, seconds: float) -> None:
        """Add the sequence's share of the time of a pass."""
        self._seconds += seconds

    def elapsed(self, now: float) -> float:
        """Seconds since the start of the round."""
        return now - self._started

    def set_seconds(self, seconds: float) -> None:
        """Set the duration of the round from ``elapsed``, equal on all ranks; the sequences share it."""
        self._seconds = seconds / self._num_seqs

    @property
    def min_chance(self) -> float:
        """Acceptance rate below which the draft ends at the next proposal; 0 if drafts end at their length only."""
        if self.plan is None or not self.plan.min_chance:
            return 0.0
        acceptance = self._drafter.acceptance[self.plan.exit]
        return self.plan.min_chance / math.prod(acceptance.rate(each) for each in self._confidences)

    def propose(self, token: int, confidence: float) -> bool:
        """Add a token of the drafting exit to the draft. Returns False, without adding it, if the draft ends here."""
        assert self.plan is not None
        if self.plan.min_chance > 0:
            acceptance = self._drafter.acceptance[self.plan.exit]
            chance = math.prod(acceptance.rate(each) for each in (*self._confidences, confidence))
            if chance < self.plan.min_chance:
                self._unproposed = (token, confidence)
                return False
        self._confidences.append(confidence)
        return True

    def end_round(self, emitted: Sequence[int]) -> tuple[int, int, int]:
        """Finish the round and record its results.

        Args:
            emitted: the accepted proposals and one more token.

        Returns:
            The number of proposals, the number up to and including the first rejected one, and the number accepted.
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
        # Failed rounds of a sequence that backs off do not count: its text is unusual for the exits.
        if self._seconds > 0 and (accepted or not backed_off):
            self._drafter.learn(self.plan, self._num_seqs, made, len(emitted), self._seconds)
        self.abort_round()
        return made, judged, accepted

    def abort_round(self) -> None:
        """Discard the current round."""
        self.plan, self._confidences, self._unproposed = None, [], None


def bucket(tokens: int) -> int:
    """Round up to a size of similar cost: each number up to 4, then powers of two and the numbers halfway between."""
    if tokens <= 4:
        return tokens
    size = 1 << (tokens - 1).bit_length()
    return size if tokens > size * 3 // 4 else size * 3 // 4


def _bin(confidence: float) -> int:
    return min(BINS - 1, max(0, int(confidence * BINS)))


def _smooth(table: dict[K, float], key: K, value: float) -> None:
    old = table.get(key)
    # First measurements are often slow (caches, kernel selection), so a much faster one replaces the average at once.
    table[key] = value if old is None or value < 0.7 * old else old + SMOOTH * (min(value, 2 * old) - old)
