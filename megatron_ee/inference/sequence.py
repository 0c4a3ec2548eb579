"""One output of a request in work: its tokens, and how far they have run. Only the ``Scheduler`` changes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from megatron_ee.inference.heads import HeadInput
from megatron_ee.inference.policy import MOST_DEFERRED, AnyPolicy, ExitHistory
from megatron_ee.inference.requests import Draft, FinishReason, Mode, Token
from megatron_ee.inference.sampling import Sampling
from megatron_ee.inference.speculation import DraftState


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    """For memory, or for others to end; preempted ones too."""
    RUNNING = "running"
    IN_FLIGHT = "in flight"
    """Running, in a pass whose head has not reported yet."""
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class SequenceParams:
    """A request's settings for one of its sequences: tokens and numbers, no text.

    Attributes:
        request: its number.
        sample: which of the request's sequences.
        prompt_token_ids: the prompt.
        mode: see ``Request``; ``policy``, ``draft``, ``sampling``, ``max_tokens`` and ``logprobs`` too.
        exits: layers of the exits that may be asked.
        draft_exits: those of ``exits`` that may draft.
        max_length: most positions, emitted tokens included.
        stop_token_ids: tokens that end it.
        eos_token_ids: those of them that are end of text.
        forced_token_ids: what the sequence goes on with in place of what it emits; empty for that itself.
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


@dataclass(eq=False)
class Sequence:
    """State of one sequence.

    Attributes:
        seq_id: its number.
        params: fixed.
        tokens: emitted so far.
        status: see ``Status``.
        finish_reason: why it has ended.
        error: why it failed, in one line.
        num_computed_tokens: positions that the first layer has run, proposals included.
        num_cached_tokens: positions whose keys and values were copied from another request.
        depth: layers that the newest token has run; 0 where it has yet to start.
        stage: pipeline stage that holds it there.
        deferred: by depth, tokens that left there early and wait for a later pass.
        num_pass_tokens: tokens of the pass in work: the newest, and deferred ones that have joined it.
        exit_history: what the exit policy goes by.
        spec_token_ids: proposals that are not verified yet.
        drafting: state of speculative mode; None in other modes.
        num_draft_tokens: proposals judged so far.
        num_accepted_tokens: those of them that the full model accepted.
        parent: sequence whose keys and values of the prompt it will copy.
        num_passes_waited: passes of other sequences since its own last one.
        num_layer_runs: decoder layers run for tokens after the prompt; those of ``layer`` exits where they were asked.
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
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    parent: int | None = None
    num_passes_waited: int = 0
    num_layer_runs: int = 0

    @property
    def in_flight(self) -> bool:
        """Whether a pass of it is in work whose head has not reported yet."""
        return self.status is Status.IN_FLIGHT

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.params.prompt_token_ids)

    @property
    def num_tokens_with_spec(self) -> int:
        """Prompt, emitted tokens and proposals."""
        return self.num_prompt_tokens + len(self.tokens) + len(self.spec_token_ids)

    def token_ids(self, start: int = 0) -> list[int]:
        """Ids of prompt, emitted (or forced) tokens and proposals, from position ``start`` on.

        A step that asked for all of them would take the longer the longer they are.
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
        """Positions that every layer has run; for a sequence that is not in flight."""
        waiting = self.num_pass_tokens if self.depth > 0 else 0
        return self.num_computed_tokens - sum(self.deferred.values()) - waiting

    @property
    def prefilling(self) -> bool:
        """Whether tokens have yet to run that need no head."""
        behind = self.num_tokens_with_spec - self.num_computed_tokens
        return behind > 1 or self.num_computed_tokens < self.num_prompt_tokens

    @property
    def proposes(self) -> bool:
        """Whether the next token is a proposal of the drafting exit."""
        return self.drafting is not None and len(self.spec_token_ids) < self.drafting.plan_length

    def exits_to_ask(self) -> tuple[int, ...]:
        """Exits that the newest token asks on its way."""
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
        """What the head at ``depth`` has to do for the newest token; None for nothing.

        Args:
            final: depth of the final exit.
        """
        params, proposals = self.params, tuple(self.spec_token_ids)
        seen = tuple(self.token_ids()) if params.sampling.repetition_penalty != 1 else ()
        position = self.num_tokens_with_spec
        if depth == final:
            count = len(proposals)
            return HeadInput(
                "verify" if proposals else "emit",
                position - count,
                params.sampling,
                params.policy,
                proposals=proposals,
                seen=seen[: len(seen) - count],
                logprobs=params.logprobs,
            )
        if params.mode == "threshold":
            return HeadInput("leave", position, params.sampling, params.policy, depth, (), seen, params.logprobs)
        return HeadInput("draft", position, params.sampling, seen=seen) if self.proposes else None
