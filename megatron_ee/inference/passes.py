"""What the scheduler tells the pipeline stages, and a stage as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ee.inference.heads import HeadInput, HeadOutput


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence's part in a pass.

    Attributes:
        seq_id: its number.
        length: positions that it has with its newest token.
        tokens: new ones, in a pass that starts from tokens.
        head_input: what the head at the end does for it; None for nothing.
    """

    seq_id: int
    length: int
    tokens: tuple[int, ...] = ()
    head_input: HeadInput | None = None


@dataclass(frozen=True)
class Pass:
    """A run of layers for some sequences that have got equally deep.

    A depth is a number of layers that a token has run: 0 before the first, k after layer k, where its exit reads, and
    one more than the last layer for the final exit.

    Attributes:
        start: depth that the sequences have.
        stop: depth that they will have.
        sequences: that run.
        sends: go on from there to the next stage, whose layers follow.
    """

    start: int
    stop: int
    sequences: tuple[ScheduledSequence, ...]
    sends: bool = False


class StageWorker(Protocol):
    """One stage as the scheduler sees it. Calls take effect in their order.

    ``StageRunner`` is one in this process, ``RemoteStage`` one in another.
    """

    def open(self, seq_id: int, limit: int) -> None:
        """Make empty caches for at most ``limit`` positions."""

    def close(self, seq_id: int) -> None:
        """Forget a sequence."""

    def crop(self, seq_id: int, length: int) -> None:
        """Take back the positions of a sequence from ``length`` on."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Let ``target``, which is empty, begin with a copy of the first ``length`` positions of ``source``."""

    def keep(self, seq_id: int, length: int) -> None:
        """Keep the first ``length`` positions of a sequence that has ended, to be copied, and no more."""

    def run(self, pass_: Pass) -> None:
        """Start a pass."""

    def receive(self, seq_ids: Sequence[int]) -> None:
        """Take the hidden states of these sequences, which the stage before sends at the end of a pass."""

    def outputs(self) -> list[HeadOutput]:
        """Of the oldest pass that ended at a head and whose outputs were not taken; waits for them."""


@dataclass(frozen=True)
class StageMap:
    """Which layers the stages have.

    Attributes:
        ends: by stage, its last layer; for the last stage the depth of the final exit.
        layer_exits: layers of the exits with a decoder layer of their own.
    """

    ends: tuple[int, ...]
    layer_exits: frozenset[int] = frozenset()

    @property
    def final(self) -> int:
        """Depth of the final exit."""
        return self.ends[-1]

    def layers(self, start: int, stop: int) -> int:
        """Layers of the backbone between two depths."""
        return min(stop, self.final - 1) - min(start, self.final - 1)
