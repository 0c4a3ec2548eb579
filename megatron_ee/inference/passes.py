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
from megatron_ee.inference.compiled import CompiledStage
from megatron_ee.inference.heads import Answer, Ask, answer
from megatron_ee.inference.rows import Flow, Row
from megatron_ee.inference.segments import Said
from megatron_ee.model.attention import Positions
from megatron_ee.model.exits import Exit
from megatron_ee.model.layer import DecoderLayer
from megatron_ee.model.stage import Stage

TABLE = 1024
"""Positions by which the table of rotary angles grows."""


@dataclass(frozen=True)
class Work:
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
    ask: Ask | None = None


@dataclass(frozen=True)
class Chain:
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
    works: tuple[Work, ...]
    sends: bool = False


class Neighbours(Protocol):
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
        links: Neighbours | None = None,
        compiled: CompiledStage | None = None,
    ) -> None:
        """``slack`` and ``pass_tokens``: as in ``Extent``."""
        self.stage, self.links, self.compiled = stage, links, compiled
        self.rows: dict[int, Row] = {}
        self._slack, self._pass_tokens = slack, pass_tokens
        self._answers: deque[list[Answer]] = deque()
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

    def answers(self) -> list[Answer]:
        """See ``StageLink``."""
        return self._answers.popleft()

    @platform.inference_attention()
    @torch.inference_mode()
    def run(self, chain: Chain) -> None:
        """Run a chain. Rows that did not leave at its end wait there, and so do those that did: their taps are kept."""
        rows = [self.rows[work.row] for work in chain.works]
        h, flow = self._enter(chain, rows)
        place, last = chain.start, min(chain.stop, self._final - 1)
        known: Said | None = None
        for stop in self._on_the_way(place, last):
            h, known = self._advance(place, stop, h, flow, self._asked(chain) if stop == last else None)
            exit_ = self._exits.get(stop)
            if exit_ is not None and (stop < chain.stop or chain.sends):
                if exit_.layer is not None:
                    exit_.attention_half(h, flow.positions, flow.exit_caches(stop))
                h, flow = self._join(stop, h, flow)
            place = stop
        if place < chain.stop or chain.sends:
            h = self._leave_exit(place, h)
        if chain.sends:
            assert self.links is not None
            self.links.send(h.split(flow.counts), [row.drafts for row in rows])
            for row in rows:
                row.drafts = []
            return
        head = self._final_head if chain.stop == self._final else self._exit_head
        answers = head(chain, h, flow, known)
        if answers:
            self._answers.append(answers)

    def _on_the_way(self, place: int, last: int) -> list[int]:
        """Where tokens that go from one place to another come by an exit, and the other."""
        stops = self._stops.get((place, last))
        if stops is None:
            stops = sorted({layer for layer in self._exits if place < layer < last} | ({last} - {place}))
            self._stops[place, last] = stops
        return stops

    def _enter(self, chain: Chain, rows: list[Row]) -> tuple[Tensor, Flow]:
        """The tokens that start: embedded, or those that wait there."""
        if chain.start == 0:
            h = self._embed([token for work in chain.works for token in work.tokens])
            return h, self._flow(rows, [len(work.tokens) for work in chain.works], [w.stop for w in chain.works])
        taps = [row.held.pop(chain.start) for row in rows]
        counts = [sum(map(len, held)) for held in taps]
        parts = [tap for held in taps for tap in held]
        h = parts[0] if len(parts) == 1 else torch.cat(parts)
        return h, self._flow(rows, counts, [work.stop for work in chain.works])

    def _embed(self, ids: Sequence[int]) -> Tensor:
        """``[tokens, 1, hidden]``."""
        if len(ids) == 1 and self._words is not None:
            return self._words[ids[0] : ids[0] + 1].unsqueeze(1)  # no tensor of ids to make, nor to send to a device
        return self.stage.backbone.embed(platform.to_device(torch.tensor([ids])))

    def _asked(self, chain: Chain) -> int | None:
        """Place of the head that one row asks about one token, with its whole vocabulary; None for another question."""
        work, exit_ = chain.works[0], self._exits.get(chain.stop)
        if len(chain.works) > 1 or work.ask is None or work.ask.tokens > 1 or _drafts(exit_, [work.ask]):
            return None
        return chain.stop

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

    def _exit_head(self, chain: Chain, tap: Tensor, flow: Flow, known: Said | None) -> list[Answer]:
        """Answers of the exit at the end of a chain, if they are not known; then the tokens wait there."""
        exit_, asking = self._exits.get(chain.stop), [work.ask for work in chain.works if work.ask is not None]
        answers: list[Answer] = []
        if exit_ is not None:
            x = tap if exit_.layer is None else exit_.attention_half(tap, flow.positions, flow.exit_caches(chain.stop))
            if asking:
                x = _newest(x, chain, flow)
                if known is None and not _drafts(exit_, asking):
                    known = self._compiled_head(chain.stop, x)
                answers = self._answer(known or (_exit_logits(exit_, exit_.rest(x)[:, 0], asking), None), chain, asking)
        parts = [tap] if len(flow.rows) == 1 else tap.split(flow.counts)
        remaining = iter(answers)
        for work, row, part in zip(chain.works, flow.rows, parts, strict=True):
            left = work.ask is not None and bool(next(remaining).tokens)
            if not (left and chain.stop == self._final - 1):  # else no layer is left to fill
                row.held.setdefault(chain.stop, []).append(part)
        return answers

    def _final_head(self, chain: Chain, h: Tensor, flow: Flow, known: Said | None) -> list[Answer]:
        asking = [work.ask for work in chain.works if work.ask is not None]
        if not asking:
            return []
        x = _newest(h, chain, flow)
        known = known or self._compiled_head(self._final, x)
        return self._answer(known or (self.stage.final_logits(self.stage.final_features(x)[:, 0]), None), chain, asking)

    def _compiled_head(self, place: int, x: Tensor) -> Said | None:
        return None if self.compiled is None else self.compiled.head(place, x)

    def _answer(self, said: tuple[Tensor, Tensor | None], chain: Chain, asking: Sequence[Ask]) -> list[Answer]:
        """From logits, and the likeliest tokens where they are known."""
        rows = [self.rows[work.row] for work in chain.works if work.ask is not None]
        answers = answer(said[0], asking, [row.drafts for row in rows], said[1])
        for row, ask in zip(rows, asking, strict=True):
            if ask.kind == "verify":
                row.drafts = []
        return answers

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


def _drafts(exit_: Exit | None, asking: Sequence[Ask]) -> list[bool]:
    """Which rows choose from the exit's candidates alone; empty where none does."""
    drafts = [exit_ is not None and exit_.candidates is not None and ask.kind == "draft" for ask in asking]
    return drafts if any(drafts) else []


def _exit_logits(exit_: Exit, z: Tensor, asking: Sequence[Ask]) -> Tensor:
    """Logits of one token of each row that asks, ``[rows, vocab]``; drafts are chosen from the candidates alone."""
    drafts = _drafts(exit_, asking)
    if exit_.candidates is None or not drafts:
        return exit_.logits(z)
    if all(drafts):
        return exit_.candidate_logits(z)
    logits = exit_.logits(z)
    for row, draft in zip(logits, drafts, strict=True):
        if draft:
            row.masked_fill_(exit_.candidates.left_out, -torch.inf)
    return logits


def _newest(h: Tensor, chain: Chain, flow: Flow) -> Tensor:
    """Of the rows that ask, the last tokens that the head reads, ``[tokens, 1, hidden]``."""
    if len(flow.rows) == 1:
        ask = chain.works[0].ask
        assert ask is not None
        return h[-ask.tokens :]
    parts = zip(chain.works, h.split(flow.counts), strict=True)
    return torch.cat([part[-work.ask.tokens :] for work, part in parts if work.ask is not None])
