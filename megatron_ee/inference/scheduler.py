"""The scheduler decides which sequences run which layers next, and updates them from head outputs.

It owns every ``Sequence``. It is deterministic except for measured times, which ``broadcast_seconds`` makes equal on
all ranks. So each tensor-parallel rank can run its own copy on the same requests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from megatron_ee import platform
from megatron_ee.inference.heads import HeadInput, HeadOutput
from megatron_ee.inference.kv_cache_manager import KVCacheManager, Prefix
from megatron_ee.inference.passes import Pass, ScheduledSequence, StageMap, StageWorker
from megatron_ee.inference.requests import FinishReason, Token
from megatron_ee.inference.sequence import Sequence, Status
from megatron_ee.inference.speculation import Drafter, DraftState
from megatron_ee.parallel.tiles import PASS_TOKENS

MAX_PASSES_WAITED = 4
"""A depth with a sequence that has waited for so many passes of others runs next, the deepest such depth first."""


class Timer(Protocol):
    """Measures device work, as ``platform.DeviceTimer`` does."""

    def stop(self) -> None:
        """End the measurement after the work that was started so far."""

    def seconds(self) -> float:
        """Seconds that the work took; waits until it is done."""


@dataclass
class _PendingPass:
    """A pass whose head outputs are pending. ``timer`` is None unless drafts are planned by measured time."""

    stage: int
    pass_: Pass
    seqs: list[Sequence]
    timer: Timer | None


@dataclass
class Scheduler:
    """Schedules running and waiting sequences.

    Attributes:
        stages: the pipeline stages.
        stage_map: their layers.
        kv_caches: the KV caches of the sequences.
        max_num_seqs: maximum number of running sequences.
        drafter: plans the drafts of speculative mode.
        broadcast_seconds: gives all tensor-parallel ranks the first one's seconds.
        start_timer: starts to measure the device work of a pass.
        running: running sequences by number, in the order in which they began to run.
        waiting: waiting sequences, the next one first.
        num_preempted: number of preemptions.
    """

    stages: list[StageWorker]
    stage_map: StageMap
    kv_caches: KVCacheManager
    max_num_seqs: int
    drafter: Drafter
    broadcast_seconds: Callable[[float], float] = lambda seconds: seconds
    start_timer: Callable[[], Timer] = platform.DeviceTimer
    running: dict[int, Sequence] = field(default_factory=dict)
    waiting: deque[Sequence] = field(default_factory=deque)
    num_preempted: int = 0
    _pending: deque[_PendingPass] = field(default_factory=deque)
    _prefilled: bool = False

    def add(self, seqs: Iterable[Sequence]) -> None:
        """Queue the new sequences of one request. The first one computes the KV of the prompt for all."""
        parent, *others = seqs
        for seq in others:
            seq.parent = parent.seq_id
        for seq in (parent, *others):
            params = seq.params
            if params.mode == "speculative":
                fixed = (params.draft.exit, params.draft.length)
                seq.drafting = DraftState(self.drafter, params.draft_exits, fixed, params.sampling.greedy)
            self.waiting.append(seq)

    def finish(self, seq_id: int, reason: FinishReason) -> None:
        """End a sequence. A sequence that has already ended is ignored."""
        seq = self.running.get(seq_id) or next((each for each in self.waiting if each.seq_id == seq_id), None)
        if seq is not None:
            self._remove(seq)
            seq.status, seq.finish_reason = Status.FINISHED, reason

    @property
    def idle(self) -> bool:
        """Whether no sequence is running or waiting, and no head outputs are pending, not even of cancelled ones."""
        return not self.running and not self.waiting and not self._pending

    @property
    def num_running(self) -> int:
        """Number of running sequences."""
        return len(self.running)

    def heartbeat(self) -> None:
        """Show the stages that the scheduler is alive. Without calls, the wait of a remote one would time out."""
        for stage in self.stages:
            stage.heartbeat()

    def step(self) -> list[tuple[Sequence, list[Token]]]:
        """Let waiting sequences run, start a pass on each free stage, and process the oldest pending pass's outputs.

        Returns:
            The sequences that emitted tokens or failed, with their new tokens.
        """
        self._run_waiting()
        for stage in range(len(self.stages)):
            self._schedule(stage)
        return self._update() if self._pending else []

    # ----------------------------------------------------------------------------------- waiting sequences and memory

    def _run_waiting(self) -> None:
        """Let waiting sequences run, in their order, as far as their number and KV memory allow."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            parent = None if seq.parent is None else self.running[seq.parent]
            if parent is not None and parent.num_computed_tokens >= parent.num_prompt_tokens - 1:
                seq.parent = None  # too late to copy: the parent has already forked
            # A sequence with a parent copies the whole prompt later.
            reusable = seq.reusable_ids() if seq.parent is None else []
            others = (_prefix(each) for each in self.running.values() if not each.in_flight)
            limit, length = seq.params.max_length, seq.num_tokens_with_spec
            copied = self.kv_caches.open(seq.seq_id, limit, length, reusable, others)
            if copied is None:
                return
            self.waiting.popleft()
            # A preempted sequence may copy emitted tokens too.
            seq.num_computed_tokens, seq.num_cached_tokens = copied, min(copied, seq.num_prompt_tokens)
            seq.status, seq.scheduled = Status.RUNNING, seq.scheduled or time.perf_counter()
            self.running[seq.seq_id] = seq

    def _remove(self, seq: Sequence) -> None:
        """Remove a sequence from those that run or wait. Its KV may be kept for others."""
        self._orphan(seq.seq_id)
        if self.running.pop(seq.seq_id, None) is None:
            self.waiting.remove(seq)
            return
        if seq.status is Status.RUNNING:
            self.kv_caches.keep(_prefix(seq))
        else:
            self.kv_caches.close(seq.seq_id)

    def _make_room(self, seq: Sequence, length: int) -> bool:
        """Claim KV memory for ``length`` positions, preempting younger sequences if needed.

        Returns:
            False if this sequence has to wait.
        """
        if seq.seq_id not in self.running:  # preempted earlier in this step
            return False
        while not self.kv_caches.claim(seq.seq_id, seq.params.max_length, length):
            youngest = next((each for each in reversed(self.running.values()) if not each.in_flight), None)
            if youngest is None:
                return False
            self._preempt(youngest)
            if youngest is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Move a running sequence back to the waiting ones. Its KV is dropped and later recomputed."""
        del self.running[seq.seq_id]
        self.kv_caches.close(seq.seq_id)
        self._orphan(seq.seq_id)
        seq.status = Status.WAITING
        seq.num_computed_tokens = seq.num_cached_tokens = seq.depth = seq.stage = seq.num_passes_waited = 0
        seq.spec_token_ids, seq.deferred, seq.parent = [], {}, None
        if seq.drafting is not None:
            seq.drafting.abort_round()
        self.waiting.appendleft(seq)
        self.num_preempted += 1

    def _orphan(self, seq_id: int) -> None:
        """Clear the parent of all sequences that would copy this sequence's prompt."""
        for each in (*self.running.values(), *self.waiting):
            if each.parent == seq_id:
                each.parent = None

    def _fork(self, parent: Sequence) -> None:
        """Copy a prompt's KV to the child sequences, once all of the prompt except its last token has run."""
        children = [each for each in self.running.values() if each.parent == parent.seq_id]
        if not children or parent.num_computed_tokens < parent.num_prompt_tokens - 1:
            return
        for child in children:
            self.kv_caches.copy(parent.seq_id, child.seq_id, parent.num_computed_tokens)
            child.num_computed_tokens, child.parent = parent.num_computed_tokens, None
        self._orphan(parent.seq_id)  # children that do not run yet compute the prompt themselves

    # --------------------------------------------------------------------------------------------------------- passes

    def _schedule(self, stage: int) -> None:
        """Start a pass on a stage if it is free. Prompts alternate with the depth chosen by ``choose_depth``."""
        if any(pending.stage == stage for pending in self._pending):
            return
        ready = [s for s in self.running.values() if s.stage == stage and not s.in_flight and s.parent is None]
        prompts = [seq for seq in ready if seq.depth == 0 and seq.prefilling]
        by_depth: dict[int, list[Sequence]] = {}
        for seq in ready:
            if seq.depth > 0 or not seq.prefilling:
                by_depth.setdefault(seq.depth, []).append(seq)
        if prompts and (not by_depth or not self._prefilled):
            self._prefilled = True
            self._run_prompts(prompts)
            return
        if stage == 0:  # prompts start there alone: a pass of another stage does not give them the next turn
            self._prefilled = False
        if not by_depth:
            return
        depth = choose_depth({depth: [s.num_passes_waited for s in seqs] for depth, seqs in by_depth.items()})
        for other, seqs in by_depth.items():
            for seq in seqs:
                seq.num_passes_waited = 0 if other == depth else seq.num_passes_waited + 1
        chosen = by_depth[depth]
        if depth == 0:
            for seq in chosen:
                self._begin_round(seq, len(chosen))
            chosen = [seq for seq in chosen if self._make_room(seq, seq.num_tokens_with_spec)]
            # Making room for one may have preempted another that was chosen before it.
            chosen = [seq for seq in chosen if seq.seq_id in self.running]
        if chosen:
            new = [seq.token_ids(seq.num_computed_tokens) if depth == 0 else [] for seq in chosen]
            self._start(stage, depth, chosen, new)

    def _begin_round(self, seq: Sequence, num_seqs: int) -> None:
        """Plan the drafts of a sequence in speculative mode."""
        if seq.drafting is None:
            return
        # The last token needs no proposal, and proposals need positions too.
        params = seq.params
        room = min(params.max_tokens - len(seq.tokens), params.max_length - seq.num_tokens_with_spec)
        seq.drafting.begin_round(num_seqs, time.perf_counter(), room - 1)

    def _run_prompts(self, prompts: list[Sequence]) -> None:
        """Run the next tokens of prompts, oldest first, at most ``PASS_TOKENS`` in total."""
        chosen, tokens, left = [], [], PASS_TOKENS
        for seq in prompts:
            new = seq.token_ids(seq.num_computed_tokens)
            # The last token runs in a later pass if children copy the tokens before it, or after a preemption, so that
            # it asks its exits as usual.
            forks = any(each.parent == seq.seq_id for each in self.running.values())
            if len(new) > 1 and (seq.tokens or forks):
                new = new[:-1]
            new = new[:left]
            if not new or not self._make_room(seq, seq.num_computed_tokens + len(new)):
                break
            chosen.append(seq)
            tokens.append(new)
            left -= len(new)
        pairs = [(s, new) for s, new in zip(chosen, tokens, strict=True) if s.seq_id in self.running]
        if pairs:
            self._start(0, 0, [seq for seq, _ in pairs], [new for _, new in pairs])

    def _start(self, stage: int, depth: int, seqs: list[Sequence], tokens: list[list[int]]) -> None:
        """Run sequences from ``depth`` to the first depth at which one of them stops."""
        end, final = self.stage_map.ends[stage], self.stage_map.final
        stop = min(next_stop(depth, seq.exits_to_ask(), end) for seq in seqs)
        scheduled = []
        for seq, new in zip(seqs, tokens, strict=True):
            seq.num_computed_tokens += len(new)
            asks = stop == final or (stop in seq.exits_to_ask() and depth != stop)
            newest = seq.num_computed_tokens == seq.num_tokens_with_spec
            head_input = seq.head_input(stop, final) if asks and newest else None
            self._count_layers(seq, depth, stop, len(new), asked=head_input is not None)
            scheduled.append(
                ScheduledSequence(seq.seq_id, seq.num_computed_tokens, tuple(new), head_input, seq.replay_input())
            )
        reports = any(each.head_input is not None for each in scheduled)
        pass_ = Pass(depth, stop, tuple(scheduled), sends=stop == end != final and not reports)
        timer = self._run(stage, pass_, seqs)
        if reports:
            for seq in seqs:
                seq.status = Status.IN_FLIGHT
            self._pending.append(_PendingPass(stage, pass_, seqs, timer))
        else:
            self._advance(stage, pass_, seqs)

    def _run(self, stage: int, pass_: Pass, seqs: list[Sequence]) -> Timer | None:
        """Run a pass, with a timer if drafts are planned by measured time.

        The timer is read together with the head outputs. Reading it here could deadlock: a pass that sends finishes
        only after the next stage receives, and the command to receive is sent after this call.
        """
        measured = stage == 0 and (len(self.stages) == 1 or _runs_from_tokens_to_heads(pass_))
        if not measured or not any(seq.drafting is not None and seq.drafting.plans_by_time for seq in seqs):
            self.stages[stage].run(pass_)
            return None
        timer = self.start_timer()
        self.stages[stage].run(pass_)
        timer.stop()
        return timer

    def _count_layers(self, seq: Sequence, depth: int, stop: int, new: int, *, asked: bool) -> None:
        """Add the deferred tokens between two depths to a sequence's pass, and count the layers that it runs."""
        tokens = new if depth == 0 else seq.num_pass_tokens + seq.deferred.pop(depth, 0)
        at, runs = depth, 0
        for layer in sorted(layer for layer in seq.deferred if depth < layer < stop):
            runs += tokens * self.stage_map.layers(at, layer)
            tokens, at = tokens + seq.deferred.pop(layer), layer
        seq.num_pass_tokens = tokens
        # A preempted sequence runs its emitted tokens again, all but the newest in passes like those of a prompt.
        if seq.num_prompt_tokens < seq.num_computed_tokens == seq.num_tokens_with_spec:
            runs += tokens * self.stage_map.layers(at, stop)
            # For other tokens, the exit's own layer only computes keys and values.
            seq.num_layer_runs += runs + int(asked and stop in self.stage_map.layer_exits)

    def _advance(self, stage: int, pass_: Pass, seqs: list[Sequence]) -> None:
        """Move sequences to the end of a pass in which no head ran for them."""
        if pass_.sends:
            self.stages[stage + 1].receive([seq.seq_id for seq in seqs])
        for seq in seqs:
            seq.depth = pass_.stop
            if pass_.sends:
                seq.stage = stage + 1
            elif pass_.stop == self.stage_map.final:
                seq.depth = seq.stage = 0
                self._fork(seq)

    def _fill(self, stage: int, depth: int, seq: Sequence) -> None:
        """Fill the KV of the remaining layers for a token that has just left, while the next token starts."""
        ends = self.stage_map.ends
        for index in range(stage, len(self.stages)):
            start, end = (depth if index == stage else ends[index - 1]), ends[index]
            seq.num_layer_runs += sum(seq.deferred.values()) * self.stage_map.layers(start, end)
            sends = end != self.stage_map.final
            scheduled = ScheduledSequence(seq.seq_id, seq.num_computed_tokens)
            self.stages[index].run(Pass(start, end, (scheduled,), sends))
            if sends:
                self.stages[index + 1].receive([seq.seq_id])
        seq.deferred.clear()

    # --------------------------------------------------------------------------------------------------- head outputs

    def _update(self) -> list[tuple[Sequence, list[Token]]]:
        """Process the head outputs of the oldest pending pass."""
        pending = self._pending.popleft()
        stage, pass_ = pending.stage, pending.pass_
        outputs = iter(self.stages[stage].outputs())
        self._learn_time(pending)
        emitted = []
        for seq, scheduled in zip(pending.seqs, pass_.sequences, strict=True):
            output = None if scheduled.head_input is None else next(outputs)
            if seq.status is not Status.IN_FLIGHT:  # it has ended in the meantime
                continue
            seq.status, seq.depth = Status.RUNNING, pass_.stop
            if output is None or scheduled.head_input is None:
                self._advance(stage, pass_, [seq])
                continue
            tokens = self._process(seq, scheduled.head_input, output, pass_.stop)
            if seq.status is not Status.RUNNING:
                emitted.append((seq, tokens))
                continue
            if tokens:
                emitted.append((seq, tokens))
            left = scheduled.head_input.kind == "leave" and seq.depth == 0
            if left and stage > 0 and seq.deferred:  # a token that leaves after the last layer is not deferred
                self._fill(stage, pass_.stop, seq)
        return emitted

    def _process(self, seq: Sequence, head_input: HeadInput, output: HeadOutput, depth: int) -> list[Token]:
        """Update a sequence from the head output at ``depth``.

        Its newest token then starts at depth 0, or continues from ``depth``.

        Returns:
            The emitted tokens.
        """
        last, kind = self.stage_map.final - 1, head_input.kind
        if seq.tokens:
            seq.num_head_runs += bool(output.tokens) or not head_input.gated
        if not output.finite:
            place = f"after layer {min(depth, last)} at position {head_input.position}"
            self._fail(seq, f"the logits {place} are not finite")
            return []
        if kind == "draft":
            assert seq.drafting is not None
            if output.tokens and seq.drafting.propose(output.tokens[0], output.confidences[0]):
                seq.spec_token_ids.append(output.tokens[0])
                self._defer(seq, depth)
            return []
        if kind == "leave":
            if not output.tokens:
                seq.exit_history.stayed(depth, len(seq.tokens))
                return []
            seq.exit_history.left(depth, early=depth < last)
            self._defer(seq, depth)
        else:
            seq.exit_history.ran_all_layers()
            seq.depth = seq.stage = 0
        layers = [depth if kind == "leave" else last] * len(output.tokens)
        if seq.drafting is not None and seq.drafting.plan is not None:
            layers[:-1] = [seq.drafting.plan_exit] * (len(layers) - 1)
            self._end_round(seq, output.tokens)
        logprobs = output.logprobs or (None,) * len(output.tokens)
        made = list(map(Token, output.tokens, layers, output.confidences, logprobs))
        if len(made) <= len(head_input.proposals):  # the last one is in place of a rejected proposal
            made[-1] = replace(made[-1], rejected=head_input.proposals[len(made) - 1])
        tokens = _emit(seq, made)
        if kind == "verify" and seq.num_computed_tokens >= seq.num_tokens_with_spec:
            seq.num_computed_tokens = seq.num_tokens_with_spec - 1
            self.kv_caches.crop(seq.seq_id, seq.num_computed_tokens)
        if seq.finish_reason is None:
            return tokens
        if seq.params.replayed_token_ids:
            seq.replay = tuple(each for stage in self.stages for each in stage.replayed(seq.seq_id))
            for exit_ in seq.replay:
                if not exit_.finite:
                    self._fail(seq, f"the logits after layer {min(exit_.depth, last)} are not finite")
                    return []
        self._remove(seq)
        seq.status = Status.FINISHED
        return tokens

    def _fail(self, seq: Sequence, error: str) -> None:
        """End a sequence with an error message of one line."""
        seq.status, seq.error = Status.FAILED, error
        self._remove(seq)

    def _defer(self, seq: Sequence, depth: int) -> None:
        """Defer the newest token, which has left at ``depth``, and the deferred tokens that joined its pass."""
        if depth < self.stage_map.final - 1:
            seq.deferred[depth] = seq.deferred.get(depth, 0) + seq.num_pass_tokens
        seq.depth = seq.stage = 0

    def _end_round(self, seq: Sequence, emitted: tuple[int, ...]) -> None:
        """End a round of speculative decoding, after the full model has verified the proposals."""
        assert seq.drafting is not None
        if len(self.stages) > 1 and seq.drafting.plans_by_time:
            # Stages run concurrently, so a round is measured from its start to its end.
            seq.drafting.set_seconds(self.broadcast_seconds(seq.drafting.elapsed(time.perf_counter())))
        made, judged, accepted = seq.drafting.end_round(emitted)
        seq.num_drafts += made > 0
        seq.num_draft_tokens += made
        seq.num_judged_tokens += judged
        counts = seq.num_accepted_tokens_per_pos
        counts += [0] * (accepted - len(counts))
        counts[:accepted] = [count + 1 for count in counts[:accepted]]
        seq.spec_token_ids = []

    def _learn_time(self, pending: _PendingPass) -> None:
        """Record the duration of a pass. Its head outputs have arrived, so reading the timer does not wait."""
        if pending.timer is None:
            return
        pass_, seconds = pending.pass_, self.broadcast_seconds(pending.timer.seconds())
        if len(self.stages) == 1:
            for seq in pending.seqs:
                if seq.drafting is not None:
                    seq.drafting.add_seconds(seconds / len(pending.seqs))
        if _runs_from_tokens_to_heads(pass_):
            self.drafter.costs.observe(pass_.stop, len(pass_.sequences), seconds)


def _emit(seq: Sequence, tokens: list[Token]) -> list[Token]:
    """Append tokens to a sequence, up to one that ends it. Returns the appended tokens."""
    params = seq.params
    for number, token in enumerate(tokens, start=1):
        seq.tokens.append(token)
        if token.id in params.stop_token_ids:
            seq.finish_reason = "eos" if token.id in params.eos_token_ids else "stop"
        elif len(seq.tokens) == params.max_tokens:
            seq.finish_reason = "length"
        elif seq.num_prompt_tokens + len(seq.tokens) == params.max_length:
            seq.finish_reason = "context"
        if seq.finish_reason is not None:
            return tokens[:number]
    return tokens


def choose_depth(waiting: Mapping[int, list[int]], max_waited: int = MAX_PASSES_WAITED) -> int:
    """Choose the depth whose sequences run next.

    A pass over a few tokens costs about as much as a pass over one, because it reads the same weights. So the depth
    with the most sequences runs next (the deepest of several), unless a sequence has waited ``max_waited`` passes.

    Args:
        waiting: by depth, the number of passes that each sequence there has waited.
        max_waited: see above.
    """
    late = [depth for depth, waited in waiting.items() if max(waited) >= max_waited]
    return max(late) if late else max(waiting, key=lambda depth: (len(waiting[depth]), depth))


def next_stop(depth: int, exits: tuple[int, ...], end: int) -> int:
    """The depth at which a token from ``depth`` stops: the next exit that it asks, or the ``end`` of the stage."""
    return min((layer for layer in exits if depth < layer <= end), default=end)


def _runs_from_tokens_to_heads(pass_: Pass) -> bool:
    """Whether a pass starts at depth 0 and its head runs for all sequences. The costs of such passes are recorded."""
    return pass_.start == 0 and all(seq.head_input is not None for seq in pass_.sequences)


def _prefix(seq: Sequence) -> Prefix:
    """The reusable prefix of a sequence that is not in flight."""
    return Prefix(seq.seq_id, tuple(seq.token_ids()[: seq.num_complete_tokens]))
