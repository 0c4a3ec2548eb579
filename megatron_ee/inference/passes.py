"""Running layers for rows that have got equally far (design: inference).

A token that leaves at layer k has no keys and values above it. Its tap is kept, and the next pass of its row that goes
beyond layer k takes it along, so that each layer runs each position once, in order, and its cache is exact: it is what
a pass of all tokens through all layers would have left. Layer i of a pass thus runs the positions that its cache
lacks: of each row a contiguous run that ends with its newest token and grows with depth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.compiled import CompiledStage
from megatron_ee.inference.heads import HeadInput, HeadOutput, head_outputs
from megatron_ee.inference.rows import Flow, Row
from megatron_ee.model.attention import Positions
from megatron_ee.model.traversal import run_layers, run_segment

TABLE = 1024
"""Positions by which the table of rotary angles grows."""


@dataclass(frozen=True)
class ScheduledSequence:
    """One row's part in a chain.

    Attributes:
        row: its number.
        stop: positions that it has with the newest token.
        tokens: new ones, in a chain that starts from tokens.
        ask: what the head at the end is asked; None for nothing.
    """

    row: int
    stop: int
    tokens: tuple[int, ...] = ()
    head_input: HeadInput | None = None


@dataclass(frozen=True)
class Pass:
    """A run of layers for some rows, from one place where rows wait to another.

    Places are layers: 0 before the first, k after layer k, where its exit reads, and one more than the last layer for
    the final exit.

    Attributes:
        start: place where the rows are.
        stop: place where they will be.
        works: the rows.
        sends: go on from there to the next stage, whose layers follow.
    """

    start: int
    stop: int
    sequences: tuple[ScheduledSequence, ...]
    sends: bool = False


class StageChannel(Protocol):
    """What joins a stage to those before and behind it."""

    def send(self, parts: Sequence[Tensor], drafts: Sequence[Sequence[Tensor]]) -> None:
        """Start sending rows' hidden states, ``[tokens, 1, hidden]`` each, and their drafts, to the stage behind."""

    def receive(self, rows: int) -> list[tuple[Tensor, list[Tensor]]]:
        """What the stage before has sent of so many rows; waits for it."""


class StageRunner:
    """The layers and exits of one stage, and the rows that it runs: a ``StageLink`` within this process.

    Attributes:
        stage: with the embedding, or the final exit, where it is the first, or the last.
        rows: by number.
        links: to the stages before and behind; None where there are none.
        compiled: its layers and heads once more; None where they are not compiled.
    """

    def __init__(
        self,
        stage: Stage,
        slack: int,
        pass_tokens: int,
        links: StageChannel | None = None,
        compiled: CompiledStage | None = None,
    ) -> None:
        """``slack`` and ``pass_tokens``: as in ``Extent``."""
        self.stage, self.links, self.compiled = stage, links, compiled
        self.rows: dict[int, Row] = {}
        self._slack, self._pass_tokens = slack, pass_tokens
        self._outputs: deque[list[HeadOutput]] = deque()
        self._exits = {exit_.spec.layer: exit_ for exit_ in stage.exits}
        self._first = min(number for number, _ in stage.backbone.numbered_layers())
        self._final = stage.setup.architecture.num_layers + 1
        self._table = stage.backbone.packed_positions(torch.arange(0, device=platform.device()))

    def open(self, row: int, limit: int) -> None:
        """See ``StageLink``."""
        self.rows[row] = Row(self.stage, limit, self._slack, self._pass_tokens)

    def close(self, row: int) -> None:
        """See ``StageLink``."""
        del self.rows[row]

    def crop(self, row: int, length: int) -> None:
        """See ``StageLink``."""
        self.rows[row].crop(length)

    @torch.inference_mode()  # as all that rows hold: code that is compiled for it holds for nothing else
    def copy(self, row: int, other: int, length: int) -> None:
        """See ``StageLink``."""
        self.rows[other].begin(self.rows[row], length)

    def keep(self, row: int, length: int) -> None:
        """See ``StageLink``."""
        self.rows[row].keep(length)

    @torch.inference_mode()
    def receive(self, rows: Sequence[int]) -> None:
        """See ``StageLink``."""
        assert self.links is not None
        place = self._first - 1
        for row, (h, drafts) in zip(rows, self.links.receive(len(rows)), strict=True):
            self.rows[row].held.setdefault(place, []).append(h)
            self.rows[row].drafts += drafts

    def outputs(self) -> list[HeadOutput]:
        """See ``StageLink``."""
        return self._outputs.popleft()

    @platform.inference_attention()
    @torch.inference_mode()
    def run(self, pass_: Pass) -> None:
        """Run a chain. Rows that did not leave at its end wait there, and so do those that did: their taps are kept."""
        rows = [self.rows[seq.row] for seq in pass_.sequences]
        h, flow = self._enter(pass_, rows)
        last = min(pass_.stop, self._final - 1)
        goes_on = pass_.sends or pass_.stop > last

        def at_tap(layer: int, tap: Tensor) -> Tensor:
            if layer == last and not goes_on:
                return tap
            exit_ = self._exits[layer]
            if exit_.layer is not None:
                exit_.attention_half(tap, flow.positions, flow.exit_cache(layer))
            return self._join(layer, tap, flow)

        def run(start: int, stop: int, x: Tensor) -> Tensor:
            return self._run_segment(start, stop, x, flow)

        h = run_layers(run, self.stage.taps, pass_.start, last, h, at_tap, to_hidden=goes_on)
        if pass_.sends:
            assert self.links is not None
            self.links.send(h.split(flow.counts), [row.drafts for row in rows])
            for row in rows:
                row.drafts = []
            return
        head = self._final_head if pass_.stop == self._final else self._exit_head
        outputs = head(pass_, h, flow)
        if outputs:
            self._outputs.append(outputs)

    def _enter(self, pass_: Pass, rows: list[Row]) -> tuple[Tensor, Flow]:
        """The tokens that start: embedded, or those that wait there."""
        if pass_.start == 0:
            ids = [token for seq in pass_.sequences for token in seq.tokens]
            h = self.stage.backbone.embed(platform.to_device(torch.tensor([ids])))
            return h, self._flow(rows, [len(seq.tokens) for seq in pass_.sequences], [w.stop for w in pass_.sequences])
        taps = [row.held.pop(pass_.start) for row in rows]
        counts = [sum(map(len, held)) for held in taps]
        parts = [tap for held in taps for tap in held]
        h = parts[0] if len(parts) == 1 else torch.cat(parts)
        return h, self._flow(rows, counts, [seq.stop for seq in pass_.sequences])

    def _run_segment(self, start: int, stop: int, x: Tensor, flow: Flow) -> Tensor:
        """``traversal.run_segment``, by compiled code where there is some."""
        if self.compiled is not None and len(flow.rows) == 1:
            caches = [flow.rows[0].caches[layer] for layer in range(start + 1, stop + 1)]
            done = self.compiled.run(start, stop, x, flow.positions, caches, flow.masks)
            if done is not None:
                return done
        stage = self.stage
        return run_segment(stage.backbone.layers_between, stage.taps, start, stop, x, flow.positions, flow.cache)

    def _join(self, layer: int, tap: Tensor, flow: Flow) -> Tensor:
        """With each row's tokens those that were deferred at ``layer``, who come first."""
        if not any(layer in row.held for row in flow.rows):
            return tap
        parts, counts = [], []
        for row, own in zip(flow.rows, tap.split(flow.counts), strict=True):
            mine = [*row.held.pop(layer, ()), own]
            parts += mine
            counts.append(sum(map(len, mine)))
        flow.counts, flow.positions, flow.masks = counts, self._positions(counts, flow.stops), {}
        return torch.cat(parts)

    def _exit_head(self, pass_: Pass, tap: Tensor, flow: Flow) -> list[HeadOutput]:
        """Outputs of the exit at the end of a pass; then the tokens wait there."""
        exit_ = self._exits.get(pass_.stop)
        inputs = [seq.head_input for seq in pass_.sequences if seq.head_input is not None]
        outputs: list[HeadOutput] = []
        if exit_ is not None:
            x = tap if exit_.layer is None else exit_.attention_half(tap, flow.positions, flow.exit_cache(pass_.stop))
            if inputs:
                x, logits = _newest(x, pass_, flow), None
                if not _drafts(exit_, inputs):
                    logits = self._compiled_logits(pass_.stop, x)
                if logits is None:
                    logits = _exit_logits(exit_, exit_.rest(x)[:, 0], inputs)
                outputs = self._head_outputs(logits, pass_, inputs)
        parts = [tap] if len(flow.rows) == 1 else tap.split(flow.counts)
        remaining = iter(outputs)
        for seq, row, part in zip(pass_.sequences, flow.rows, parts, strict=True):
            left = seq.head_input is not None and bool(next(remaining).tokens)
            if not (left and pass_.stop == self._final - 1):  # else no layer is left to fill
                row.held.setdefault(pass_.stop, []).append(part)
        return outputs

    def _final_head(self, pass_: Pass, h: Tensor, flow: Flow) -> list[HeadOutput]:
        inputs = [seq.head_input for seq in pass_.sequences if seq.head_input is not None]
        if not inputs:
            return []
        x = _newest(h, pass_, flow)
        logits = self._compiled_logits(self._final, x)
        if logits is None:
            logits = self.stage.final_logits(self.stage.final_features(x)[:, 0])
        return self._head_outputs(logits, pass_, inputs)

    def _compiled_logits(self, place: int, x: Tensor) -> Tensor | None:
        return None if self.compiled is None else self.compiled.logits(place, x)

    def _head_outputs(self, logits: Tensor, pass_: Pass, inputs: Sequence[HeadInput]) -> list[HeadOutput]:
        rows = [self.rows[seq.row] for seq in pass_.sequences if seq.head_input is not None]
        outputs = head_outputs(logits, inputs, [row.drafts for row in rows])
        for row, head_input in zip(rows, inputs, strict=True):
            if head_input.kind == "verify":
                row.drafts = []
        return outputs

    def _flow(self, rows: list[Row], counts: list[int], stops: list[int]) -> Flow:
        return Flow(rows, counts, stops, self._positions(counts, stops))

    def _positions(self, counts: list[int], stops: list[int]) -> Positions:
        """Rotary angles of each row's last tokens, from a table that grows."""
        need, table = max(stops), self._table
        if len(table.cos) < need:
            length = -(-need // TABLE) * TABLE
            table = self._table = self.stage.backbone.packed_positions(torch.arange(length, device=platform.device()))
        spans = [slice(stop - count, stop) for count, stop in zip(counts, stops, strict=True)]
        if len(spans) == 1:
            return Positions(table.cos[spans[0]], table.sin[spans[0]])
        cos, sin = (torch.cat([angles[span] for span in spans]) for angles in (table.cos, table.sin))
        return Positions(cos, sin)


def _drafts(exit_: Exit | None, inputs: Sequence[HeadInput]) -> list[bool]:
    """Which rows choose from the exit's candidates alone; empty where none does."""
    drafts = [
        exit_ is not None and exit_.candidates is not None and head_input.kind == "draft" for head_input in inputs
    ]
    return drafts if any(drafts) else []


def _exit_logits(exit_: Exit, z: Tensor, inputs: Sequence[HeadInput]) -> Tensor:
    """Logits of one token of each row that asks, ``[rows, vocab]``; drafts are chosen from the candidates alone."""
    drafts = _drafts(exit_, inputs)
    if exit_.candidates is None or not drafts:
        return exit_.logits(z)
    if all(drafts):
        return exit_.candidate_logits(z)
    logits = exit_.logits(z)
    for row, draft in zip(logits, drafts, strict=True):
        if draft:
            row.masked_fill_(exit_.candidates.left_out, -torch.inf)
    return logits


def _newest(h: Tensor, pass_: Pass, flow: Flow) -> Tensor:
    """Of the rows that ask, the last tokens that the head reads, ``[tokens, 1, hidden]``."""
    if len(flow.rows) == 1:
        head_input = pass_.sequences[0].head_input
        assert head_input is not None
        return h[-head_input.tokens :]
    parts = zip(pass_.sequences, h.split(flow.counts), strict=True)
    return torch.cat([part[-seq.head_input.tokens :] for seq, part in parts if seq.head_input is not None])
