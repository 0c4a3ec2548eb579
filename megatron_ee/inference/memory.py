"""How much memory the keys and values of rows take: the engine admits, and sets aside, by these figures alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.inference.kv_cache import CHUNK, Extent


@dataclass(frozen=True)
class StageMemory:
    """What one stage keeps of a row.

    Attributes:
        position_bytes: of one position in one layer, on one tensor-parallel rank.
        windows: of each layer, those of ``layer`` exits included.
    """

    position_bytes: int
    windows: tuple[int | None, ...]

    def row_bytes(self, extent: Extent, length: int) -> int:
        """Of a row of ``length`` positions; ``extent`` gives all but the window."""
        total = 0
        for window in set(self.windows):
            own = Extent(extent.limit, window, extent.slack, extent.pass_tokens)
            total += self.windows.count(window) * own.room(length)
        return total * self.position_bytes


def stage_memory(
    architecture: Architecture, layers: Sequence[int], exits: Sequence[ExitSpec], tensor: int, element_size: int
) -> StageMemory:
    """Of a stage with these layers and the exits hosted there.

    Args:
        tensor: number of tensor-parallel ranks.
        element_size: bytes per number of keys and values.
    """
    windows = [architecture.windows[number - 1] for number in layers]
    windows += [architecture.windows[-1] for spec in exits if spec.body == "layer"]
    heads = -(-architecture.num_kv_heads // tensor)
    return StageMemory(2 * heads * architecture.head_dim * element_size, tuple(windows))


@dataclass
class Budget:
    """Memory that keys and values may take on each stage.

    Attributes:
        total: bytes per stage.
        stages: what each keeps of a row.
        slack: as in ``Extent``.
        pass_tokens: as in ``Extent``.
    """

    total: int
    stages: Sequence[StageMemory]
    slack: int
    pass_tokens: int

    def __post_init__(self) -> None:
        self._claims: dict[int, int] = {}
        self._room: dict[int, int] = {}

    def needed(self, limit: int, length: int) -> int:
        """Bytes of a row of ``length`` positions that ends at ``limit``, on the stage where it takes most."""
        extent = Extent(limit, None, self.slack, self.pass_tokens)
        return max(stage.row_bytes(extent, length) for stage in self.stages)

    @property
    def used(self) -> int:
        """Bytes that are claimed."""
        return sum(self._claims.values())

    def claim(self, row: int, limit: int, length: int) -> bool:
        """Claim room for a row to have ``length`` positions; False, and nothing claimed, where it does not fit."""
        if length <= self._room.get(row, 0):  # as for nearly every token
            return True
        wanted, own = self.needed(limit, length), self._claims.get(row, 0)
        if self.used - own + wanted > self.total:
            return False
        self._claims[row] = max(own, wanted)
        self._room[row] = min(limit, -(-length // CHUNK) * CHUNK)
        return True

    def release(self, row: int) -> None:
        """Give back what a row has claimed."""
        self._claims.pop(row, None)
        self._room.pop(row, None)
