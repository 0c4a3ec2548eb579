"""The interface between the scheduler and the pipeline stages: passes, and the methods of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ee.inference.heads import HeadInput, HeadOutput
from megatron_ee.inference.replay import ExitReplay, ReplayInput


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence in a pass.

    Attributes:
        seq_id: number of the sequence.
        length: length of the sequence, including its newest token.
        tokens: ids of its new tokens, in a pass that starts at depth 0.
        head_input: task of the head at the end of the pass; None if the head does not run for this sequence.
        replay: tokens of the pass at which exits on its way are asked; None for none.
    """

    seq_id: int
    length: int
    tokens: tuple[int, ...] = ()
    head_input: HeadInput | None = None
    replay: ReplayInput | None = None


@dataclass(frozen=True)
class Pass:
    """One run of a range of layers, for sequences at the same depth.

    The depth of a token is the number of layers that it has run: 0 for none, k after layer k (the input of its exit),
    and the number of layers plus one after the final exit.

    Attributes:
        start: depth of the sequences before the pass.
        stop: depth after it.
        sequences: the sequences that run.
        sends: whether their hidden states are then sent to the next stage.
    """

    start: int
    stop: int
    sequences: tuple[ScheduledSequence, ...]
    sends: bool = False

    @property
    def has_outputs(self) -> bool:
        """Whether the head at its end runs for any of the sequences."""
        return any(seq.head_input is not None for seq in self.sequences)


class StageWorker(Protocol):
    """The stage interface that the scheduler uses. Calls take effect in order.

    ``StageRunner`` is a stage in this process, ``RemoteStage`` one in another process.
    """

    def open(self, seq_id: int, limit: int) -> None:
        """Create empty caches of at most ``limit`` positions for a new sequence."""

    def close(self, seq_id: int) -> None:
        """Delete a sequence."""

    def crop(self, seq_id: int, length: int) -> None:
        """Remove the positions of a sequence from ``length`` on."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of ``source`` into the empty sequence ``target``."""

    def keep(self, seq_id: int, length: int) -> None:
        """Keep only the first ``length`` positions of a finished sequence, for ``copy``."""

    def run(self, pass_: Pass) -> None:
        """Start a pass."""

    def receive(self, seq_ids: Sequence[int]) -> None:
        """Receive the hidden states of these sequences from the previous stage."""

    def outputs(self) -> list[HeadOutput]:
        """Wait for and return the head outputs of the oldest pass whose outputs have not been returned yet."""

    def heartbeat(self) -> None:
        """Show a stage that waits for the next call that the scheduler is alive."""

    def replayed(self, seq_id: int) -> list[ExitReplay]:
        """Wait for and return what the exits of this stage say of the text that a sequence replays, by depth."""


@dataclass(frozen=True)
class StageMap:
    """The layers of the stages.

    Attributes:
        ends: last layer of each stage; for the last stage, the depth of the final exit.
        layer_exits: layers of the exits that have their own decoder layer.
    """

    ends: tuple[int, ...]
    layer_exits: frozenset[int] = frozenset()

    @property
    def final(self) -> int:
        """Depth of the final exit."""
        return self.ends[-1]

    def layers(self, start: int, stop: int) -> int:
        """Number of backbone layers between two depths."""
        return min(stop, self.final - 1) - min(start, self.final - 1)
