"""What the scheduler tells the stages: the passes to run, and where sequences may stop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from megatron_ee.inference.heads import HeadInput, HeadOutput


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence's part in a pass.

    Attributes:
        row: the sequence's number.
        stop: positions that it has with the newest token.
        tokens: new ones, in a pass that starts from tokens.
        head_input: for the head at the end; None where it is not asked.
    """

    row: int
    stop: int
    tokens: tuple[int, ...] = ()
    head_input: HeadInput | None = None


@dataclass(frozen=True)
class Pass:
    """A run of layers for some sequences, from one place to another.

    Places are layers: 0 before the first, k after layer k, where its exit reads, and one more than the last layer for
    the final exit.

    Attributes:
        start: place where the sequences are.
        stop: place where they will be.
        sequences: that take part.
        sends: go on from there to the next stage, whose layers follow.
    """

    start: int
    stop: int
    sequences: tuple[ScheduledSequence, ...]
    sends: bool = False


class StageWorker(Protocol):
    """One stage as the scheduler sees it; what is called is done in that order.

    ``stage_runner.StageRunner`` is one in this process, ``remote.RemoteStage`` one in another.
    """

    def open(self, row: int, limit: int) -> None:
        """Begin a sequence of at most ``limit`` positions."""

    def close(self, row: int) -> None:
        """Forget a sequence."""

    def crop(self, row: int, length: int) -> None:
        """Take back the positions of a sequence from ``length`` on."""

    def copy(self, row: int, other: int, length: int) -> None:
        """Let sequence ``other``, which is empty, begin with the first ``length`` positions of ``row``."""

    def keep(self, row: int, length: int) -> None:
        """Keep of a sequence that has ended its first ``length`` positions, to be copied, and no more."""

    def run(self, pass_: Pass) -> None:
        """Start a pass."""

    def receive(self, rows: Collection[int]) -> None:
        """Take the hidden states of these sequences that the stage before sends at the end of a pass."""

    def outputs(self) -> list[HeadOutput]:
        """Of the oldest pass with head inputs whose outputs were not taken; waits for them."""


@dataclass(frozen=True)
class StageMap:
    """Where sequences stop.

    Attributes:
        ends: by stage, its last layer; of the last stage the place of the final exit.
        layer_exits: layers of the exits with a decoder layer of their own.
    """

    ends: tuple[int, ...]
    layer_exits: frozenset[int] = frozenset()

    @property
    def final(self) -> int:
        """Place of the final exit."""
        return self.ends[-1]

    def layers(self, start: int, stop: int) -> int:
        """Layers of the backbone between two places."""
        return min(stop, self.final - 1) - min(start, self.final - 1)
