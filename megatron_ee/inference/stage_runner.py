"""The stage runner owns one stage's tensors and runs the scheduler's passes.

A token that leaves at layer k is deferred: it has no KV above layer k. Its tap is kept, and the token joins the next
pass of its sequence that goes beyond layer k. So each layer runs each position once and in order, and its KV equals
that of a full forward pass. In a pass, layer i runs the positions that its cache lacks. For each sequence this is a
contiguous range that ends with the newest token and grows with depth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.compiled import CompiledStage
from megatron_ee.inference.heads import HeadInput, HeadOutput, head_outputs
from megatron_ee.inference.kv_cache import Extent, LayerKV, Masks, PackedCaches
from megatron_ee.inference.passes import Pass
from megatron_ee.inference.replay import ExitReplay, exit_replay, replayed_rows
from megatron_ee.model.attention import Positions
from megatron_ee.model.traversal import run_layers, run_segment

TABLE = 1024
"""Growth step of the table of rotary angles, in positions."""


class StageChannel(Protocol):
    """Sends hidden states from each stage to the next."""

    def send(self, parts: Sequence[Tensor], drafts: Sequence[Sequence[Tensor]]) -> None:
        """Start sending each sequence's hidden states, ``[tokens, 1, hidden]``, and draft distributions ``[vocab]``."""

    def receive(self, num_sequences: int) -> list[tuple[Tensor, list[Tensor]]]:
        """Wait for the hidden states and draft distributions of ``num_sequences`` sequences."""


class StageSequence:
    """The tensors of one sequence on one stage, between passes.

    Attributes:
        caches: KV cache of each backbone layer, by number.
        exit_caches: KV cache of each ``layer`` exit's own layer, by layer of the exit. Every token that passes the exit
            fills it.
        waiting: by depth, the hidden states of tokens that wait there, deferred or in progress: tensors
            ``[tokens, 1, hidden]`` in order of position.
        draft_probs: distributions ``[vocab]`` that the current proposals were sampled from; empty if greedy.
        replayed: by depth of the exit, what it says of the text that is replayed, see ``replayed_rows``.
    """

    def __init__(self, stage: Stage, limit: int, slack: int, pass_tokens: int) -> None:
        """Create empty caches for at most ``limit`` positions; ``slack`` and ``pass_tokens`` as in ``Extent``."""

        def cache(window: int | None) -> LayerKV:
            return LayerKV(Extent(limit, window, slack, pass_tokens))

        self.caches = {number: cache(layer.attention.window) for number, layer in stage.backbone.numbered_layers()}
        self.exit_caches = {exit_.spec.layer: cache(window) for exit_ in stage.exits for window in exit_.windows}
        self.waiting: dict[int, list[Tensor]] = {}
        self.draft_probs: list[Tensor] = []
        self.replayed: dict[int, list[Tensor]] = {}

    @property
    def all_caches(self) -> list[LayerKV]:
        """KV caches of layers and exits."""
        return [*self.caches.values(), *self.exit_caches.values()]

    def wait(self, depth: int, tap: Tensor) -> None:
        """Append tokens to those that wait at a depth."""
        self.waiting.setdefault(depth, []).append(tap)

    def crop(self, length: int) -> None:
        """Remove the positions from ``length`` on. No token may be waiting."""
        assert not self.waiting, "no token may wait when a sequence is cropped"
        for cache in self.all_caches:
            cache.crop(length)

    def begin(self, other: StageSequence, length: int) -> None:
        """Copy the first ``length`` positions of another sequence into this empty one."""
        for mine, theirs in zip(self.all_caches, other.all_caches, strict=True):
            mine.begin(theirs, length)

    def keep(self, length: int) -> None:
        """Keep only the KV of the first ``length`` positions. The sequence has ended."""
        self.waiting, self.draft_probs = {}, []
        self.crop(length)


@dataclass
class TokenBatch:
    """The sequences and positions of a pass's packed tokens ``[tokens, 1, hidden]``, at one depth.

    Attributes:
        sequences: in the order of the pass.
        counts: number of tokens of each sequence.
        stops: length of each sequence, including its newest token.
        positions: positions of the tokens.
        masks: attention masks, see ``PackedCaches``.
    """

    sequences: list[StageSequence]
    counts: list[int]
    stops: list[int]
    positions: Positions
    masks: Masks = field(default_factory=dict)

    def cache(self, layer: int) -> PackedCaches:
        """KV caches of a backbone layer."""
        return PackedCaches([each.caches[layer] for each in self.sequences], self.counts, self.masks)

    def exit_cache(self, layer: int) -> PackedCaches:
        """KV caches of the ``layer`` exit after a layer."""
        return PackedCaches([each.exit_caches[layer] for each in self.sequences], self.counts, self.masks)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """Split ``[tokens, 1, hidden]`` by sequence."""
        return [x] if len(self.counts) == 1 else x.split(self.counts)


Asking = tuple[StageSequence, HeadInput]


class StageRunner:
    """A ``StageWorker`` in this process.

    Attributes:
        stage: layers and exits; with the embedding on the first stage, and the final exit on the last.
        sequences: by number.
        channel: to the neighbouring stages; None with a single stage.
        compiled: the compiled layers; None if they are not compiled.
    """

    def __init__(
        self,
        stage: Stage,
        slack: int,
        pass_tokens: int,
        channel: StageChannel | None = None,
        compiled: CompiledStage | None = None,
    ) -> None:
        """Create a runner without sequences; ``slack`` and ``pass_tokens`` as in ``Extent``."""
        self.stage, self.channel, self.compiled = stage, channel, compiled
        self.sequences: dict[int, StageSequence] = {}
        self._slack, self._pass_tokens = slack, pass_tokens
        self._outputs: deque[list[HeadOutput]] = deque()
        self._exits = {exit_.spec.layer: exit_ for exit_ in stage.exits}
        self._first = min(number for number, _ in stage.backbone.numbered_layers())
        self._final = stage.setup.architecture.num_layers + 1
        self._table = stage.backbone.packed_positions(torch.arange(0, device=platform.device()))

    def open(self, seq_id: int, limit: int) -> None:
        """See ``StageWorker``."""
        self.sequences[seq_id] = StageSequence(self.stage, limit, self._slack, self._pass_tokens)

    def close(self, seq_id: int) -> None:
        """See ``StageWorker``."""
        del self.sequences[seq_id]

    def crop(self, seq_id: int, length: int) -> None:
        """See ``StageWorker``."""
        self.sequences[seq_id].crop(length)

    @torch.inference_mode()  # compiled code is specialised to inference tensors, as all other cached tensors are
    def copy(self, source: int, target: int, length: int) -> None:
        """See ``StageWorker``."""
        self.sequences[target].begin(self.sequences[source], length)

    def keep(self, seq_id: int, length: int) -> None:
        """See ``StageWorker``."""
        self.sequences[seq_id].keep(length)

    @torch.inference_mode()
    def receive(self, seq_ids: Collection[int]) -> None:
        """See ``StageWorker``."""
        assert self.channel is not None, "there is no previous stage"
        for seq_id, (h, draft_probs) in zip(seq_ids, self.channel.receive(len(seq_ids)), strict=True):
            self.sequences[seq_id].wait(self._first - 1, h)
            self.sequences[seq_id].draft_probs += draft_probs

    def outputs(self) -> list[HeadOutput]:
        """See ``StageWorker``."""
        return self._outputs.popleft()

    def heartbeat(self) -> None:
        """See ``StageWorker``. Nothing waits in this process."""

    def replayed(self, seq_id: int) -> list[ExitReplay]:
        """See ``StageWorker``."""
        gated = {layer for layer, exit_ in self._exits.items() if exit_.gate is not None}
        found = sorted(self.sequences[seq_id].replayed.items())
        return [exit_replay(depth, parts, gated=depth in gated) for depth, parts in found]

    @platform.inference_attention()
    @torch.inference_mode()
    def run(self, pass_: Pass) -> None:
        """Run a pass. All its tokens then wait at its end, also those that left: deeper layers need their tap."""
        x, batch = self._start(pass_)
        last = min(pass_.stop, self._final - 1)
        goes_on = pass_.sends or pass_.stop > last

        def run(start: int, stop: int, x: Tensor) -> Tensor:
            return self._run_segment(start, stop, x, batch)

        def at_tap(layer: int, tap: Tensor) -> Tensor:
            if layer == last and not goes_on:
                return tap
            self._enter_exit(self._exits[layer], tap, pass_, batch)
            return self._join_deferred(layer, tap, batch)

        x = run_layers(run, self.stage.taps, pass_.start, last, x, at_tap, to_hidden=goes_on)
        if pass_.sends:
            self._send(x, batch)
        elif pass_.stop == self._final:
            self._run_final_exit(pass_, x, batch)
        else:
            self._run_exit(pass_, x, batch)

    def _start(self, pass_: Pass) -> tuple[Tensor, TokenBatch]:
        """The tokens at the start of a pass: new ones, embedded, or those that wait at its depth."""
        sequences = [self.sequences[seq.seq_id] for seq in pass_.sequences]
        stops = [seq.length for seq in pass_.sequences]
        if pass_.start == 0:
            ids = [token for seq in pass_.sequences for token in seq.tokens]
            x, counts = self._embed(ids), [len(seq.tokens) for seq in pass_.sequences]
        else:
            waiting = [each.waiting.pop(pass_.start) for each in sequences]
            parts = [tap for taps in waiting for tap in taps]
            x, counts = parts[0] if len(parts) == 1 else torch.cat(parts), [sum(map(len, taps)) for taps in waiting]
        return x, TokenBatch(sequences, counts, stops, self._positions(counts, stops))

    def _embed(self, ids: Sequence[int]) -> Tensor:
        """Embed tokens: ``[tokens, 1, hidden]``."""
        return self.stage.backbone.embed(platform.to_device(torch.tensor([ids])))

    def _run_segment(self, start: int, stop: int, x: Tensor, batch: TokenBatch) -> Tensor:
        """Run ``traversal.run_segment``, with compiled code if possible."""
        stage = self.stage
        if self.compiled is not None and len(batch.sequences) == 1:
            caches = [batch.sequences[0].caches[layer] for layer in range(start + 1, stop + 1)]
            done = self.compiled.run(start, stop, x, batch.positions, caches, batch.masks)
            if done is not None:
                return done
        return run_segment(stage.backbone.layers_between, stage.taps, start, stop, x, batch.positions, batch.cache)

    def _join_deferred(self, layer: int, tap: Tensor, batch: TokenBatch) -> Tensor:
        """Add the tokens that were deferred at ``layer`` to the batch, before the other tokens of their sequence."""
        if not any(layer in each.waiting for each in batch.sequences):
            return tap
        parts, counts = [], []
        for sequence, own in zip(batch.sequences, batch.split(tap), strict=True):
            joined = [*sequence.waiting.pop(layer, ()), own]
            parts += joined
            counts.append(sum(map(len, joined)))
        batch.counts, batch.positions = counts, self._positions(counts, batch.stops)
        return torch.cat(parts)

    def _send(self, h: Tensor, batch: TokenBatch) -> None:
        """Send hidden states and draft distributions to the next stage."""
        assert self.channel is not None, "there is no next stage"
        self.channel.send(batch.split(h), [each.draft_probs for each in batch.sequences])
        for each in batch.sequences:
            each.draft_probs = []

    def _enter_exit(self, exit_: Exit, tap: Tensor, pass_: Pass, batch: TokenBatch) -> Tensor:
        """The input of an exit's ``rest`` for all tokens of a pass. Its own layer, if it has one, gets their KV."""
        layer = exit_.spec.layer
        x = exit_.attention_half(tap, batch.positions, batch.exit_cache(layer)) if exit_.windows else tap
        self._replay(layer, x, pass_, batch, exit_.rest, exit_.head.logits, exit_.gate)
        return x

    def _replay(
        self,
        depth: int,
        x: Tensor,
        pass_: Pass,
        batch: TokenBatch,
        features: Callable[[Tensor], Tensor],
        logits: Callable[[Tensor], Tensor],
        gate: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Ask the exit at a depth at the tokens whose replay asks it; arguments as for ``replayed_rows``."""
        if all(scheduled.replay is None for scheduled in pass_.sequences):
            return
        for scheduled, sequence, part in zip(pass_.sequences, batch.sequences, batch.split(x), strict=True):
            asked = scheduled.replay
            if asked is not None and (depth == self._final or depth in asked.exits):
                rows = replayed_rows(asked, part, features, logits, gate)
                sequence.replayed.setdefault(depth, []).extend(rows)

    def _run_exit(self, pass_: Pass, tap: Tensor, batch: TokenBatch) -> None:
        """Run the exit at the end of a pass, if there is one. The tokens then wait there."""
        exit_, left = self._exits.get(pass_.stop), [False] * len(batch.sequences)
        if exit_ is not None:
            x = self._enter_exit(exit_, tap, pass_, batch)
            if pass_.has_outputs:
                z = exit_.rest(_newest(x, pass_, batch))[:, 0]
                outputs = _gated_outputs(exit_, z, _asking(pass_, batch))
                self._outputs.append(outputs)
                emitted = iter([bool(output.tokens) for output in outputs])
                left = [seq.head_input is not None and next(emitted) for seq in pass_.sequences]
        for sequence, part, leaves in zip(batch.sequences, batch.split(tap), left, strict=True):
            if not (leaves and pass_.stop == self._final - 1):  # after the last layer there is no KV left to fill
                sequence.wait(pass_.stop, part)

    def _run_final_exit(self, pass_: Pass, h: Tensor, batch: TokenBatch) -> None:
        """Run the final exit for the sequences that ask it, if any."""
        self._replay(self._final, h, pass_, batch, self.stage.final_features, self.stage.final_logits)
        if pass_.has_outputs:
            z = self.stage.final_features(_newest(h, pass_, batch))[:, 0]
            self._outputs.append(_head_outputs(self.stage.final_logits(z), _asking(pass_, batch)))

    def _positions(self, counts: list[int], stops: list[int]) -> Positions:
        """Positions of the last ``counts`` tokens of sequences of length ``stops``, from a table that grows."""
        need, table = max(stops), self._table
        if len(table.angles[0][0]) < need:
            length = -(-need // TABLE) * TABLE
            table = self._table = self.stage.backbone.packed_positions(torch.arange(length, device=platform.device()))
        return table.pick([slice(stop - count, stop) for count, stop in zip(counts, stops, strict=True)])


def _asking(pass_: Pass, batch: TokenBatch) -> list[Asking]:
    """The sequences that ask the head, with their inputs."""
    return [
        (sequence, scheduled.head_input)
        for sequence, scheduled in zip(batch.sequences, pass_.sequences, strict=True)
        if scheduled.head_input is not None
    ]


def _gated_outputs(exit_: Exit, z: Tensor, asking: Sequence[Asking]) -> list[HeadOutput]:
    """The head outputs of an exit from z ``[sequences, hidden]``. Its gate decides first for which of them it runs.

    The gate's probabilities are a transfer of their own, before that of the head.
    """
    inputs = [each for _, each in asking]
    if exit_.gate is None or not any(each.gated for each in inputs):
        return _head_outputs(_exit_logits(exit_, z, inputs), asking)
    chances = exit_.gate(z).tolist()
    outputs = [HeadOutput(finite=chance == chance) for chance in chances]
    chosen = [n for n, each in enumerate(inputs) if not each.gated or each.passes(chances[n])]
    if not chosen:
        return outputs
    through = [
        (asking[n][0], replace(inputs[n], kind="emit") if inputs[n].kind == "leave" and inputs[n].gated else inputs[n])
        for n in chosen
    ]
    rows = z if len(chosen) == len(inputs) else torch.stack([z[n] for n in chosen])
    found = _head_outputs(_exit_logits(exit_, rows, [each for _, each in through]), through)
    for n, output in zip(chosen, found, strict=True):
        outputs[n] = replace(output, confidences=(chances[n],)) if inputs[n].gated and output.tokens else output
    return outputs


def _head_outputs(logits: Tensor, asking: Sequence[Asking]) -> list[HeadOutput]:
    outputs = head_outputs(logits, [each for _, each in asking], [sequence.draft_probs for sequence, _ in asking])
    for sequence, head_input in asking:
        if head_input.kind == "verify":
            sequence.draft_probs = []
    return outputs


def _exit_logits(exit_: Exit, z: Tensor, inputs: Sequence[HeadInput]) -> Tensor:
    """Logits ``[tokens, vocab]`` from z ``[tokens, hidden]``. Draft tokens are restricted to the exit's candidates."""
    drafts = [each.kind == "draft" for each in inputs]
    if exit_.head.candidates is None or not any(drafts):
        return exit_.head.logits(z)
    if all(drafts):
        return exit_.head.candidate_logits(z)
    logits = exit_.head.logits(z)
    for row, draft in zip(logits, drafts, strict=True):
        if draft:
            row.masked_fill_(exit_.head.candidates.left_out, -torch.inf)
    return logits


def _newest(x: Tensor, pass_: Pass, batch: TokenBatch) -> Tensor:
    """The tokens that the head reads, ``[tokens, 1, hidden]``: the last ones of each sequence that asks it."""
    parts = [
        part[-scheduled.head_input.tokens :]
        for scheduled, part in zip(pass_.sequences, batch.split(x), strict=True)
        if scheduled.head_input is not None
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
