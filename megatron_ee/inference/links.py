"""The stages as the engine sees them, and the places where rows stop in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ee.inference.heads import HeadOutput
from megatron_ee.inference.passes import Pass


class StageWorker(Protocol):
    """One stage as the engine sees it; what is called is done in that order.

    ``passes.StageRunner`` is one in this process, ``remote.RemoteStage`` one in another.
    """

    def open(self, row: int, limit: int) -> None:
        """Make an empty row for at most ``limit`` positions."""

    def close(self, row: int) -> None:
        """Forget a row."""

    def crop(self, row: int, length: int) -> None:
        """Take back the positions of a row from ``length`` on."""

    def copy(self, row: int, other: int, length: int) -> None:
        """Let row ``other``, which is empty, begin with the first ``length`` positions of ``row``."""

    def keep(self, row: int, length: int) -> None:
        """Keep of a row that has ended its first ``length`` positions, to be copied, and no more."""

    def run(self, pass_: Pass) -> None:
        """Start a chain."""

    def receive(self, rows: Sequence[int]) -> None:
        """Take the hidden states of these rows that the stage before sends at the end of a chain."""

    def outputs(self) -> list[HeadOutput]:
        """Of the oldest chain that asks and whose answers were not taken; waits for them."""


@dataclass(frozen=True)
class StageMap:
    """Where rows stop.

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
