"""The state of one output of a request. Only the ``Scheduler`` changes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from megatron_ee.inference.heads import HeadInput, Kind
from megatron_ee.inference.policy import MOST_DEFERRED, AnyPolicy, ExitHistory
from megatron_ee.inference.replay import ExitReplay, ReplayInput
from megatron_ee.inference.requests import Draft, FinishReason, Mode, Token
from megatron_ee.inference.sampling import Sampling
from megatron_ee.inference.speculation import DraftState


class Status(Enum):
    """Status of a sequence."""

    WAITING = "waiting"
    """Not scheduled yet, or preempted."""
    RUNNING = "running"
    IN_FLIGHT = "in flight"
    """Running, in a pass whose head outputs are pending."""
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class SequenceParams:
    """The settings of one sequence, without text. See ``Request`` for the attributes that are not listed.

    Attributes:
        request: number of the request.
        sample: index of the sequence in the request.
        prompt_token_ids: the prompt.
        exits: layers of the exits to use.
        draft_exits: layers of those that may draft.
        max_length: maximum number of positions, including the prompt.
        stop_token_ids: tokens that end the sequence.
        eos_token_ids: those of ``stop_token_ids`` that are end-of-text tokens.
        forced_token_ids: tokens that continue the sequence in place of the emitted ones; empty for none.
        replayed_token_ids: tokens in whose place the exits are asked; empty for none. All but the last one are the end
            of the prompt.
    """

    request: int
    sample: int
    prompt_token_ids: tuple[int, ...]
    mode: Mode
    policy: AnyPolicy
    draft: Draft
    exits: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    max_length: int
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    forced_token_ids: tuple[int, ...] = ()
    draft_exits: tuple[int, ...] = ()
    replayed_token_ids: tuple[int, ...] = ()


@dataclass(eq=False)
class Sequence:
    """State of one sequence.

    Attributes:
        seq_id: number of the sequence.
        params: settings; constant.
        tokens: emitted tokens.
        status: see ``Status``.
        finish_reason: reason of the end, once finished.
        error: error message of one line, once failed.
        num_computed_tokens: positions that the first layer has run, including proposals.
        num_cached_tokens: prompt tokens whose KV was copied from another request.
        depth: number of layers that the newest token has run; 0 before it starts.
        stage: pipeline stage that holds the newest token's hidden state.
        deferred: by depth, the number of tokens that left there early and wait for a later pass.
        num_pass_tokens: tokens of the current pass: the new ones, and the deferred ones that have joined it.
        exit_history: input of the exit policy.
        spec_token_ids: proposals that are not verified yet.
        drafting: state of speculative mode; None in other modes.
        num_drafts: number of rounds with at least one proposal.
        num_draft_tokens: number of proposals verified.
        num_judged_tokens: number of them up to and including the first rejected one of each round.
        num_accepted_tokens_per_pos: number accepted, by their position among the proposals of a round.
        parent: number of the sequence from which it will copy the prompt's KV; None for none.
        num_passes_waited: passes of other sequences since its last one.
        scheduled: when it was first scheduled, in seconds of ``time.perf_counter``; None before.
        num_layer_runs: decoder layers run for tokens after the prompt. The own layer of a ``layer`` exit counts if its
            head was asked. Emitted tokens that run again after a preemption do not count.
        num_head_runs: heads run after the first token. A head that verifies several proposals at once counts once, and
            one that a gate kept from running does not count.
        replay: what the exits say of the replayed tokens, once finished.
    """

    seq_id: int
    params: SequenceParams
    tokens: list[Token] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    depth: int = 0
    stage: int = 0
    deferred: dict[int, int] = field(default_factory=dict)
    num_pass_tokens: int = 0
    exit_history: ExitHistory = field(default_factory=ExitHistory)
    spec_token_ids: list[int] = field(default_factory=list)
    drafting: DraftState | None = None
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_judged_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    parent: int | None = None
    num_passes_waited: int = 0
    scheduled: float | None = None
    num_layer_runs: int = 0
    num_head_runs: int = 0
    replay: tuple[ExitReplay, ...] = ()

    @property
    def in_flight(self) -> bool:
        """Whether it is in a pass whose head outputs are pending."""
        return self.status is Status.IN_FLIGHT

    @property
    def num_accepted_tokens(self) -> int:
        """Number of proposals accepted."""
        return sum(self.num_accepted_tokens_per_pos)

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens."""
        return len(self.params.prompt_token_ids)

    @property
    def num_tokens_with_spec(self) -> int:
        """Number of prompt tokens, emitted tokens and proposals."""
        return self.num_prompt_tokens + len(self.tokens) + len(self.spec_token_ids)

    def token_ids(self, start: int = 0) -> list[int]:
        """Ids of prompt, emitted (or forced) tokens and proposals, from position ``start`` on.

        The cost is proportional to the length of the result, not of the sequence.
        """
        params = self.params
        emitted = max(0, start - self.num_prompt_tokens)
        proposed = max(0, emitted - len(self.tokens))
        if params.forced_token_ids:
            tokens = list(params.forced_token_ids[emitted : len(self.tokens)])
        else:
            tokens = [token.id for token in self.tokens[emitted:]]
        return [*params.prompt_token_ids[start:], *tokens, *self.spec_token_ids[proposed:]]

    @property
    def num_complete_tokens(self) -> int:
        """Number of positions that every layer has run. Valid only if the sequence is not in flight."""
        waiting = self.num_pass_tokens if self.depth > 0 else 0
        return self.num_computed_tokens - sum(self.deferred.values()) - waiting

    @property
    def prefilling(self) -> bool:
        """Whether tokens before the newest one, or tokens of the prompt, have not started yet."""
        behind = self.num_tokens_with_spec - self.num_computed_tokens
        return behind > 1 or self.num_computed_tokens < self.num_prompt_tokens

    @property
    def proposes(self) -> bool:
        """Whether the next token is a proposal of the drafting exit."""
        return self.drafting is not None and len(self.spec_token_ids) < self.drafting.plan_length

    @property
    def _first_replayed(self) -> int:
        """Position of the token that is followed by the first replayed one."""
        return self.num_prompt_tokens - len(self.params.replayed_token_ids)

    def reusable_ids(self) -> list[int]:
        """Token ids of the positions whose KV may be a copy, and one more. Replayed positions have to run."""
        return self.token_ids()[: self._first_replayed + 1 if self.params.replayed_token_ids else None]

    def replay_input(self) -> ReplayInput | None:
        """The tokens of the current pass at which the exits are asked; None for none."""
        params, stop = self.params, self.num_computed_tokens - self._first_replayed
        following = params.replayed_token_ids[max(0, stop - self.num_pass_tokens) : max(0, stop)]
        return ReplayInput(following, params.exits, params.policy.measure, params.logprobs) if following else None

    def exits_to_ask(self) -> tuple[int, ...]:
        """Layers of the exits that the newest token asks."""
        if self.prefilling:
            return ()
        params, history = self.params, self.exit_history
        if params.mode == "threshold":
            if history.num_left >= MOST_DEFERRED:
                return ()
            wanted = params.policy.exits_to_ask(params.exits, len(self.tokens), history)
            return tuple(layer for layer in wanted if layer in params.exits)
        return (self.drafting.plan_exit,) if self.drafting is not None and self.proposes else ()

    def head_input(self, depth: int, final: int) -> HeadInput | None:
        """Task of the head at ``depth`` for the newest token; None if that head does not run for it.

        Args:
            depth: depth of the head.
            final: depth of the final exit.
        """
        params, drafting, min_chance = self.params, self.drafting, 0.0
        kind: Kind
        if depth == final:
            kind = "verify" if self.spec_token_ids else "emit"
        elif params.mode == "threshold":
            kind = "leave"
        elif drafting is not None and self.proposes:
            kind, min_chance = "draft", drafting.min_chance
        else:
            return None
        proposals = tuple(self.spec_token_ids) if kind == "verify" else ()
        position = self.num_tokens_with_spec - len(proposals)
        seen = tuple(self.token_ids()[:position]) if params.sampling.penalises else ()
        return HeadInput(
            kind,
            position,
            params.sampling,
            None if kind == "draft" else params.policy,
            layer=depth if kind == "leave" else 0,
            proposals=proposals,
            seen=seen,
            seen_prompt=min(self.num_prompt_tokens, len(seen)),
            logprobs=None if kind == "draft" else params.logprobs,
            min_chance=min_chance,
            forced=params.forced_token_ids[len(self.tokens)] if params.forced_token_ids else None,
        )
