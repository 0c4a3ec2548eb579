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
from megatron_ee.inference.segments import Said
from megatron_ee.model.attention import Positions
from megatron_ee.model.layer import DecoderLayer

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
        self._layers: dict[int, DecoderLayer] = dict(stage.backbone.numbered_layers())
        self._final = stage.setup.architecture.num_layers + 1
        self._stops: dict[tuple[int, int], list[int]] = {}
        self._words = stage.backbone.whole_embedding()
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
        place = min(self._layers) - 1
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
        place, last = pass_.start, min(pass_.stop, self._final - 1)
        known: Said | None = None
        for stop in self._on_the_way(place, last):
            h, known = self._advance(place, stop, h, flow, self._asked(pass_) if stop == last else None)
            exit_ = self._exits.get(stop)
            if exit_ is not None and (stop < pass_.stop or pass_.sends):
                if exit_.layer is not None:
                    exit_.attention_half(h, flow.positions, flow.exit_caches(stop))
                h, flow = self._join(stop, h, flow)
            place = stop
        if place < pass_.stop or pass_.sends:
            h = self._leave_exit(place, h)
        if pass_.sends:
            assert self.links is not None
            self.links.send(h.split(flow.counts), [row.drafts for row in rows])
            for row in rows:
                row.drafts = []
            return
        head = self._final_head if pass_.stop == self._final else self._exit_head
        outputs = head(pass_, h, flow, known)
        if outputs:
            self._outputs.append(outputs)

    def _on_the_way(self, place: int, last: int) -> list[int]:
        """Where tokens that go from one place to another come by an exit, and the other."""
        stops = self._stops.get((place, last))
        if stops is None:
            stops = sorted({layer for layer in self._exits if place < layer < last} | ({last} - {place}))
            self._stops[place, last] = stops
        return stops

    def _enter(self, pass_: Pass, rows: list[Row]) -> tuple[Tensor, Flow]:
        """The tokens that start: embedded, or those that wait there."""
        if pass_.start == 0:
            h = self._embed([token for seq in pass_.sequences for token in seq.tokens])
            return h, self._flow(rows, [len(seq.tokens) for seq in pass_.sequences], [w.stop for w in pass_.sequences])
        taps = [row.held.pop(pass_.start) for row in rows]
        counts = [sum(map(len, held)) for held in taps]
        parts = [tap for held in taps for tap in held]
        h = parts[0] if len(parts) == 1 else torch.cat(parts)
        return h, self._flow(rows, counts, [seq.stop for seq in pass_.sequences])

    def _embed(self, ids: Sequence[int]) -> Tensor:
        """``[tokens, 1, hidden]``."""
        if len(ids) == 1 and self._words is not None:
            return self._words[ids[0] : ids[0] + 1].unsqueeze(1)  # no tensor of ids to make, nor to send to a device
        return self.stage.backbone.embed(platform.to_device(torch.tensor([ids])))

    def _asked(self, pass_: Pass) -> int | None:
        """Place of the head that one row asks about one token, with its whole vocabulary; None for another question."""
        seq, exit_ = pass_.sequences[0], self._exits.get(pass_.stop)
        if (
            len(pass_.sequences) > 1
            or seq.head_input is None
            or seq.head_input.tokens > 1
            or _drafts(exit_, [seq.head_input])
        ):
            return None
        return pass_.stop

    def _advance(self, place: int, stop: int, h: Tensor, flow: Flow, asked: int | None) -> tuple[Tensor, Said | None]:
        """From the tap at one place to the tap at the next, with what the head there says of it if that is known too.

        Args:
            asked: see ``CompiledStage.run``.
        """
        if self.compiled is not None and len(flow.rows) == 1:
            done = self.compiled.run(place, stop, asked, h, flow.positions, flow.rows[0].caches, flow.masks)
            if done is not None:
                return done
        if self.compiled is not None:
            after = self.compiled.run_together(place, stop, h, flow.positions, flow.caches)
            if after is not None:
                return after, None
        h = self._leave_exit(place, h)
        for number in range(place + 1, stop + 1):
            h = self._layers[number].attention_half(h, flow.positions, flow.caches(number))
            if number < stop or not self._halves(stop):
                h = self._layers[number].mlp_half(h)
        return h, None

    def _halves(self, place: int) -> bool:
        """Whether rows wait there between a layer's halves, where an ``mlp`` exit reads."""
        exit_ = self._exits.get(place)
        return exit_ is not None and exit_.mlp is not None

    def _leave_exit(self, layer: int, tap: Tensor) -> Tensor:
        """h after ``layer`` from its exit's tap: the MLP below an ``mlp`` exit runs when it is needed."""
        return self._layers[layer].mlp_half(tap) if self._halves(layer) else tap

    def _join(self, layer: int, tap: Tensor, flow: Flow) -> tuple[Tensor, Flow]:
        """With each row's tokens those that were deferred at ``layer``, who come first."""
        if not any(layer in row.held for row in flow.rows):
            return tap, flow
        parts, counts = [], []
        for row, own in zip(flow.rows, tap.split(flow.counts), strict=True):
            mine = [*row.held.pop(layer, ()), own]
            parts += mine
            counts.append(sum(map(len, mine)))
        return torch.cat(parts), self._flow(flow.rows, counts, flow.stops)

    def _exit_head(self, pass_: Pass, tap: Tensor, flow: Flow, known: Said | None) -> list[HeadOutput]:
        """Answers of the exit at the end of a chain, if they are not known; then the tokens wait there."""
        exit_, inputs = (
            self._exits.get(pass_.stop),
            [seq.head_input for seq in pass_.sequences if seq.head_input is not None],
        )
        outputs: list[HeadOutput] = []
        if exit_ is not None:
            x = tap if exit_.layer is None else exit_.attention_half(tap, flow.positions, flow.exit_caches(pass_.stop))
            if inputs:
                x = _newest(x, pass_, flow)
                if known is None and not _drafts(exit_, inputs):
                    known = self._compiled_head(pass_.stop, x)
                outputs = self._head_outputs(
                    known or (_exit_logits(exit_, exit_.rest(x)[:, 0], inputs), None), pass_, inputs
                )
        parts = [tap] if len(flow.rows) == 1 else tap.split(flow.counts)
        remaining = iter(outputs)
        for seq, row, part in zip(pass_.sequences, flow.rows, parts, strict=True):
            left = seq.head_input is not None and bool(next(remaining).tokens)
            if not (left and pass_.stop == self._final - 1):  # else no layer is left to fill
                row.held.setdefault(pass_.stop, []).append(part)
        return outputs

    def _final_head(self, pass_: Pass, h: Tensor, flow: Flow, known: Said | None) -> list[HeadOutput]:
        inputs = [seq.head_input for seq in pass_.sequences if seq.head_input is not None]
        if not inputs:
            return []
        x = _newest(h, pass_, flow)
        known = known or self._compiled_head(self._final, x)
        return self._head_outputs(
            known or (self.stage.final_logits(self.stage.final_features(x)[:, 0]), None), pass_, inputs
        )

    def _compiled_head(self, place: int, x: Tensor) -> Said | None:
        return None if self.compiled is None else self.compiled.head(place, x)

    def _head_outputs(
        self, said: tuple[Tensor, Tensor | None], pass_: Pass, inputs: Sequence[HeadInput]
    ) -> list[HeadOutput]:
        """From logits, and the likeliest tokens where they are known."""
        rows = [self.rows[seq.row] for seq in pass_.sequences if seq.head_input is not None]
        outputs = head_outputs(said[0], inputs, [row.drafts for row in rows], said[1])
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
