"""One output in work: what it has said, how far it has run, and what is asked for it next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_ee.inference.heads import HeadInput, HeadOutput, single
from megatron_ee.inference.policy import ExitPolicy, rest
from megatron_ee.inference.requests import Draft, FinishReason, Mode, Token
from megatron_ee.inference.sampling import Sampling
from megatron_ee.inference.speculation import TRIALS, Drafter, Plan


@dataclass(frozen=True)
class SequenceParams:
    """What a request comes down to for one of its outputs: tokens and numbers, no text.

    Attributes:
        request: its number.
        sample: which output.
        prompt: token ids.
        exits: layers that may be asked.
        ends: tokens that end it.
        eos: those of them that are end of text.
        limit: most positions, emitted tokens included.
        follow: what it goes on with in place of what it emits; empty for that itself.
        drafting: those of ``exits`` that may draft.
    """

    request: int
    sample: int
    prompt: tuple[int, ...]
    mode: Mode
    policy: ExitPolicy
    draft: Draft
    exits: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    limit: int
    ends: frozenset[int] = frozenset()
    eos: frozenset[int] = frozenset()
    logprobs: int | None = None
    follow: tuple[int, ...] = ()
    drafting: tuple[int, ...] = ()


@dataclass
class Sequence:
    """State of one output.

    Attributes:
        number: of the row.
        settings: fixed.
        drafter: of speculative mode, shared by all.
        tokens: emitted.
        run: positions that the first layer has run, proposals included.
        place: where its newest token is: 0 when it has yet to start.
        stage: that holds it there.
        since_full: how many of the last tokens left before the last layer.
        stayed: by exit that was asked, how many tokens in a row have stayed there, and the position that the last of
            them asked about.
        proposals: not yet verified.
        sure: confidence of each.
        doubt: proposal after them that was not worth making, and its confidence.
        plan: of the round in work.
        vain: rounds in a row whose drafts brought nothing.
        rests: rounds that are to be without a draft for that.
        rows: that shared its passes when it began.
        began: when that was; seconds of some clock.
        spent: seconds of it, this row's share.
        deferred: by place, tokens that wait there for a later pass.
        carried: that it ends with: the newest and those that joined on the way.
        age: chains of others that it has let pass.
        waits_for: row whose keys and values of the prompt it will copy.
        reused: positions that it has begun with, copied from a row of another request.
        products: decoder layers run for tokens after the prompt; those of ``layer`` exits where they were asked.
        rounds: verifications so far.
        proposed: proposals judged.
        stood: how many of them.
        first_at: when the first token was emitted; ``submitted_at``, ``last_at`` likewise; seconds of one clock.
        failed: why it cannot go on.
        finish: why it has ended.
    """

    number: int
    settings: SequenceParams
    drafter: Drafter | None = None
    tokens: list[Token] = field(default_factory=list)
    run: int = 0
    place: int = 0
    stage: int = 0
    since_full: int = 0
    stayed: dict[int, tuple[int, int]] = field(default_factory=dict)
    proposals: list[int] = field(default_factory=list)
    sure: list[float] = field(default_factory=list)
    doubt: tuple[int, float] | None = None
    plan: Plan | None = None
    vain: int = 0
    rests: int = 0
    rows: int = 1
    began: float = 0.0
    spent: float = 0.0
    deferred: dict[int, int] = field(default_factory=dict)
    carried: int = 0
    age: int = 0
    in_flight: bool = False
    waits_for: int | None = None
    reused: int = 0
    products: int = 0
    rounds: int = 0
    proposed: int = 0
    stood: int = 0
    submitted_at: float = 0.0
    first_at: float | None = None
    last_at: float | None = None
    failed: str | None = None
    finish: FinishReason | None = None

    @property
    def ids(self) -> list[int]:
        """Prompt, emitted tokens (or those that it follows) and proposals."""
        return self.ids_from(0)

    def ids_from(self, start: int) -> list[int]:
        """Those of ``ids`` from a position on: a step that asked for all would take the longer the longer they are."""
        settings = self.settings
        said = max(0, start - len(settings.prompt))
        if settings.follow:
            tokens = list(settings.follow[said : len(self.tokens)])
        else:
            tokens = [token.id for token in self.tokens[said:]]
        made = max(0, start - len(settings.prompt) - len(self.tokens))
        return [*settings.prompt[start:], *tokens, *self.proposals[made:]]

    @property
    def known(self) -> int:
        """Number of ``ids``."""
        return len(self.settings.prompt) + len(self.tokens) + len(self.proposals)

    @property
    def complete(self) -> int:
        """Positions that every layer has run; for an output that is not in flight."""
        waiting = self.carried if self.place > 0 else 0
        return self.run - sum(self.deferred.values()) - waiting

    @property
    def prefilling(self) -> bool:
        """Whether tokens are behind that need no answer of their own."""
        behind = self.known - self.run
        return behind > 1 or self.run < len(self.settings.prompt)

    @property
    def drafts(self) -> bool:
        """Whether the next token is a proposal of the drafting exit."""
        return self.plan is not None and len(self.proposals) < self.plan.length

    @property
    def plans_by_time(self) -> bool:
        """Whether how long its passes take decides on its drafts."""
        settings = self.settings
        fixed = settings.draft.length is not None and len(settings.drafting) == 1
        return settings.mode == "speculative" and settings.sampling.greedy and not fixed

    @property
    def may_rest(self) -> bool:
        """Whether rounds without drafts may be chosen: timing may decide, and the request does not."""
        draft = self.settings.draft
        return self.settings.sampling.greedy and draft.length is None and draft.exit is None

    @property
    def lost(self) -> bool:
        """Whether so many rounds in a row have brought nothing that it rests from drafts between them."""
        return self.may_rest and rest(self.vain) > 0

    def begin_round(self, rows: int, now: float) -> None:
        """Speculative mode: decide on the next round, where none is in work."""
        if self.settings.mode != "speculative" or self.plan is not None or self.drafter is None:
            return
        exits, length = list(self.settings.drafting), self.settings.draft.length
        if not self.settings.sampling.greedy:  # what is drawn depends on the draft: timing must not decide on it
            exits, length = exits[:1], DEFAULT_LENGTH if length is None else length
        if length is not None and len(exits) == 1:
            plan = Plan(exits[0], length)
        elif self.lost and self.rests > 0:
            plan, self.rests = Plan(), self.rests - 1
        elif self.lost:  # each exit in turn: it may be another that knows this text
            plan = self.drafter.plan([exits[self.vain % len(exits)]], rows, may_rest=False)
        else:
            # What other rows' text was like says little of this one's: it begins with drafts.
            plan = self.drafter.plan(exits, rows, length, may_rest=self.may_rest and self.rounds >= TRIALS)
        self.rows, self.began, self.spent = rows, now, 0.0
        # The last token needs no proposal, and no position may lie beyond the limit.
        most = min(self.settings.max_tokens - len(self.tokens) - 1, self.settings.limit - self.known - 1)
        if plan.length > most:
            plan = Plan(plan.exit, most, plan.worth) if most > 0 else Plan()
        self.plan = plan

    def asked(self) -> tuple[int, ...]:
        """Exits that the newest token asks on its way."""
        settings = self.settings
        if self.prefilling:
            return ()
        if settings.mode == "threshold":
            if not settings.policy.may_leave(len(self.tokens), self.since_full):
                return ()
            return tuple(layer for layer in settings.exits if not self._rests(layer)) if self.stayed else settings.exits
        return (self.plan.exit,) if self.plan is not None and self.drafts else ()

    def _rests(self, layer: int) -> bool:
        """Whether an exit is not asked about the newest token, as too many before it have stayed there."""
        stayed, last = self.stayed.get(layer, (0, self.known))
        return last < self.known <= last + self.settings.policy.rest(stayed)

    def head_input(self, place: int, final: int) -> HeadInput | None:
        """What the head at ``place`` is asked about the newest token."""
        settings = self.settings
        seen = tuple(self.ids) if settings.sampling.repetition_penalty != 1 else ()
        position, logprobs = self.known, settings.logprobs
        measure = settings.policy.measure
        if place == final:
            if self.proposals:
                count = len(self.proposals)
                return HeadInput(
                    "verify",
                    position - count,
                    settings.sampling,
                    measure,
                    proposals=tuple(self.proposals),
                    seen=seen[: len(seen) - count],
                    logprobs=logprobs,
                )
            return HeadInput("emit", position, settings.sampling, measure, seen=seen, logprobs=logprobs)
        if settings.mode == "threshold":
            threshold = single(settings.policy.at(place))
            return HeadInput("leave", position, settings.sampling, measure, threshold, seen=seen, logprobs=logprobs)
        if self.drafts:
            return HeadInput("draft", position, settings.sampling, seen=seen)
        return None

    def take(self, head_output: HeadOutput, head_input: HeadInput, place: int, last: int) -> list[Token]:
        """What an answer brings; afterwards the newest token is to be started, or has to go on from ``place``.

        Args:
            place: of the head.
            last: the last layer.
        """
        if not head_output.finite:
            self.failed = f"the logits after layer {min(place, last)} at position {head_input.position} are not finite"
            return []
        if head_input.kind == "draft":
            self._propose(head_output.tokens[0], head_output.confidences[0], place, last)
            return []
        if head_input.kind == "leave":
            stayed, asked_at = self.stayed.pop(place, (0, -1))
            if not head_output.tokens:
                # A row that was set aside meanwhile asks about the same position again.
                self.stayed[place] = (stayed + (asked_at != head_input.position), head_input.position)
                return []
            # An exit after the last layer leaves nothing to fill: it counts as a full pass.
            self.since_full = self.since_full + 1 if place < last else 0
            self._defer(place, last)
        else:
            self.since_full, self.place, self.stage = 0, 0, 0
        layers = [last if head_input.kind != "leave" else place] * len(head_output.tokens)
        if self.plan is not None:
            layers[:-1] = [self.plan.exit] * (len(layers) - 1)
            self._judge(head_output.tokens)
        logprobs = head_output.logprobs or (None,) * len(head_output.tokens)
        found = list(map(Token, head_output.tokens, layers, head_output.confidences, logprobs))
        self.plan = None
        return self._emit(found)

    def _defer(self, place: int, last: int) -> None:
        """The newest token has left: it waits, and with it those that it has met so far."""
        if place < last:
            self.deferred[place] = self.deferred.get(place, 0) + self.carried
        self.place = self.stage = 0

    def _propose(self, token: int, confidence: float, place: int, last: int) -> None:
        """Take up a proposal, unless it is not worth it: then the token before it goes on from here."""
        assert self.plan is not None and self.drafter is not None
        if self.plan.worth > 0:
            acceptance, chance = self.drafter.acceptance[self.plan.exit], 1.0
            for each in (*self.sure, confidence):
                chance *= acceptance.of(each)
            if chance < self.plan.worth:
                self.doubt = (token, confidence)
                return
        self.proposals.append(token)
        self.sure.append(confidence)
        self._defer(place, last)

    def _judge(self, emitted: tuple[int, ...]) -> None:
        """Learn from what became of a round's proposals, which are no longer any."""
        assert self.plan is not None and self.drafter is not None
        stood, made, lost = len(emitted) - 1, len(self.proposals), self.lost
        judged = min(stood + 1, made)
        self.rounds += 1
        self.proposed += judged
        self.stood += stood
        if self.plan.exit:
            self.vain = 0 if stood else self.vain + 1
            self.rests = rest(self.vain)
            acceptance = self.drafter.acceptance[self.plan.exit]
            for number in range(judged):
                acceptance.observe(self.sure[number], number < stood)
            if self.doubt is not None and stood == made:
                acceptance.observe(self.doubt[1], self.doubt[0] == emitted[-1])
        # What a row says of exits that know nothing of its text would count for more than those of rows that draft.
        if self.spent > 0 and (stood or not lost):
            self.drafter.learn(self.plan, self.rows, made, len(emitted), self.spent)
        self.proposals, self.sure, self.doubt = [], [], None

    def _emit(self, tokens: Iterable[Token]) -> list[Token]:
        """Take them, up to one that ends the output."""
        settings, taken = self.settings, []
        for token in tokens:
            self.tokens.append(token)
            taken.append(token)
            if token.id in settings.ends:
                self.finish = "eos" if token.id in settings.eos else "stop"
            elif len(self.tokens) == settings.max_tokens:
                self.finish = "length"
            elif len(settings.prompt) + len(self.tokens) == settings.limit:
                self.finish = "context"
            if self.finish is not None:
                break
        return taken

    def set_aside(self) -> None:
        """Forget all that was run: it will be run again, with the same result."""
        self.run = self.place = self.stage = self.age = 0
        self.proposals, self.sure, self.doubt, self.plan = [], [], None, None
        self.deferred, self.waits_for, self.reused = {}, None, 0


DEFAULT_LENGTH = 3
"""Proposals per round where tokens are sampled and the request does not say."""
