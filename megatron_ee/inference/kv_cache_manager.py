"""Which sequences have room for keys and values, and which prefixes are kept for others. Figures and ids, no tensors.

A new sequence that begins with the same tokens as another gets a copy of its keys and values, so that nothing it does
reaches back. Only positions that every layer has run are shared: where tokens left early and were deferred, those
before the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.registry import body_of
from megatron_ee.inference.kv_cache import CHUNK, Extent

MIN_PREFIX = 16
"""Tokens that a copy must save: fewer are soon run."""


@dataclass(frozen=True)
class StageMemory:
    """What one stage keeps of a sequence.

    Attributes:
        position_bytes: of one position in one layer, on one tensor-parallel rank.
        windows: of each layer, those of ``layer`` exits included.
    """

    position_bytes: int
    windows: tuple[int | None, ...]

    def seq_bytes(self, extent: Extent, length: int) -> int:
        """Of a sequence of ``length`` positions; ``extent`` gives all but the window."""
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
    windows += [window for spec in exits for window in body_of(spec).windows(architecture)]
    heads = -(-architecture.num_kv_heads // tensor)
    return StageMemory(2 * heads * architecture.head_dim * element_size, tuple(windows))


@dataclass
class KVBudget:
    """Memory that keys and values may take on each stage.

    Attributes:
        total: bytes per stage.
        stages: what each keeps of a sequence.
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
        """Bytes of a sequence of ``length`` positions that ends at ``limit``, on the stage where it takes most."""
        extent = Extent(limit, None, self.slack, self.pass_tokens)
        return max(stage.seq_bytes(extent, length) for stage in self.stages)

    @property
    def used(self) -> int:
        """Bytes that are claimed."""
        return sum(self._claims.values())

    def claim(self, seq_id: int, limit: int, length: int) -> bool:
        """Claim room for a sequence to have ``length`` positions; False, and nothing claimed, if it does not fit."""
        if length <= self._room.get(seq_id, 0):  # as for nearly every token
            return True
        wanted, own = self.needed(limit, length), self._claims.get(seq_id, 0)
        if self.used - own + wanted > self.total:
            return False
        self._claims[seq_id] = max(own, wanted)
        self._room[seq_id] = min(limit, -(-length // CHUNK) * CHUNK)
        return True

    def release(self, seq_id: int) -> None:
        """Give back what a sequence has claimed."""
        self._claims.pop(seq_id, None)
        self._room.pop(seq_id, None)


@dataclass(frozen=True)
class Prefix:
    """What a sequence holds for others.

    Attributes:
        seq_id: its number.
        token_ids: of the positions that every layer has run.
    """

    seq_id: int
    token_ids: tuple[int, ...]


@dataclass
class PrefixCache:
    """Which ended sequences are kept; the stages hold their keys and values, the budget their claims.

    Attributes:
        max_num_seqs: sequences that are kept at a time; 0 for none, and nothing is shared.
        window: smallest of the model's sliding windows; None where it has none.
    """

    max_num_seqs: int = 0
    window: int | None = None
    _kept: dict[int, Prefix] = field(default_factory=dict)

    @property
    def seq_ids(self) -> list[int]:
        """Numbers of the kept sequences, the least recently used first."""
        return list(self._kept)

    def keep(self, prefix: Prefix) -> list[int]:
        """Keep an ended sequence; the numbers of those that are evicted for it, perhaps its own."""
        if (
            self.max_num_seqs == 0
            or len(prefix.token_ids) < MIN_PREFIX
            or any(self._covers(each, prefix) for each in self._kept.values())
        ):
            return [prefix.seq_id]
        evicted = [each.seq_id for each in self._kept.values() if self._covers(prefix, each)]
        for seq_id in evicted:
            del self._kept[seq_id]
        self._kept[prefix.seq_id] = prefix
        while len(self._kept) > self.max_num_seqs:
            evicted.append(self.evict())
        return evicted

    def longest(self, token_ids: Sequence[int], running: Iterable[Prefix]) -> Prefix | None:
        """The longest prefix of ``token_ids``, without their last one, that a kept or running sequence holds.

        None where it is shorter than ``MIN_PREFIX``.
        """
        if self.max_num_seqs == 0:
            return None
        found, wanted = None, token_ids[:-1]
        for each in (*self._kept.values(), *running):
            pairs = zip(each.token_ids, wanted, strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if shared >= MIN_PREFIX and self._serves(each, shared) and (found is None or shared > len(found.token_ids)):
                found = Prefix(each.seq_id, each.token_ids[:shared])
        if found is not None and found.seq_id in self._kept:
            self._kept[found.seq_id] = self._kept.pop(found.seq_id)
        return found

    def evict(self) -> int:
        """Forget the least recently used sequence; its number."""
        seq_id = next(iter(self._kept))
        del self._kept[seq_id]
        return seq_id

    def _covers(self, prefix: Prefix, other: Prefix) -> bool:
        """Whether ``prefix`` can replace ``other``."""
        length = len(other.token_ids)
        return prefix.token_ids[:length] == other.token_ids and self._serves(prefix, length)

    def _serves(self, prefix: Prefix, length: int) -> bool:
        """Whether a sequence still has all that a token after ``length`` positions sees.

        With a sliding window, a layer has left behind what came before the window of its newest token.
        """
        complete = len(prefix.token_ids)
        return self.window is None or complete <= self.window or length >= complete - 1
