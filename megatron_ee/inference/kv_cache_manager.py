"""Which sequences have KV caches: memory accounting, prefix caching, and the commands to the stages.

It works on sizes and token ids. The stages hold the tensors.

A new sequence that begins with the same tokens as another gets a copy of that prefix's keys and values. Because it is a
copy, the sequences do not affect each other. Only positions that every layer has run are copied, so the prefix ends
before the first deferred token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.registry import body_of
from megatron_ee.inference.kv_cache import CHUNK, Extent
from megatron_ee.inference.passes import StageWorker

MIN_PREFIX = 16
"""Minimum length of a copied prefix; shorter ones are cheap to compute."""


@dataclass(frozen=True)
class StageMemory:
    """KV memory of one stage.

    Attributes:
        position_bytes: bytes of one position in one layer, on one tensor-parallel rank.
        windows: attention window of each layer, including the layers of ``layer`` exits.
    """

    position_bytes: int
    windows: tuple[int | None, ...]

    def seq_bytes(self, extent: Extent, length: int) -> int:
        """Bytes of a sequence of ``length`` positions. The window of ``extent`` is ignored."""
        total = 0
        for window in set(self.windows):
            own = Extent(extent.limit, window, extent.slack, extent.pass_tokens)
            total += self.windows.count(window) * own.room(length)
        return total * self.position_bytes


def stage_kv_memory(
    architecture: Architecture, layers: Sequence[int], exits: Sequence[ExitSpec], tensor: int, element_size: int
) -> StageMemory:
    """KV memory of a stage.

    Args:
        architecture: of the model.
        layers: numbers of the stage's layers.
        exits: exits on the stage.
        tensor: tensor-parallel size.
        element_size: bytes per element of keys and values.
    """
    windows = [architecture.windows[number - 1] for number in layers]
    windows += [window for spec in exits for window in body_of(spec).windows(architecture)]
    heads = -(-architecture.num_kv_heads // tensor)
    return StageMemory(2 * heads * architecture.head_dim * element_size, tuple(windows))


@dataclass
class KVBudget:
    """The KV memory that sequences have claimed, against a limit.

    Attributes:
        total: limit in bytes, on each stage.
        stages: one per stage.
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
        """Bytes of a sequence of ``length`` positions with maximum length ``limit``; maximum over the stages."""
        extent = Extent(limit, None, self.slack, self.pass_tokens)
        return max(stage.seq_bytes(extent, length) for stage in self.stages)

    @property
    def used(self) -> int:
        """Claimed bytes."""
        return sum(self._claims.values())

    def claim(self, seq_id: int, limit: int, length: int) -> bool:
        """Claim memory for ``length`` positions of a sequence; returns False and changes nothing if it does not fit."""
        if length <= self._room.get(seq_id, 0):  # the usual case
            return True
        wanted, own = self.needed(limit, length), self._claims.get(seq_id, 0)
        if self.used - own + wanted > self.total:
            return False
        self._claims[seq_id] = max(own, wanted)
        self._room[seq_id] = min(limit, -(-length // CHUNK) * CHUNK)
        return True

    def holds(self, seq_id: int) -> bool:
        """Whether a sequence has claimed memory."""
        return seq_id in self._claims

    def release(self, seq_id: int) -> None:
        """Release the memory that a sequence has claimed."""
        self._claims.pop(seq_id, None)
        self._room.pop(seq_id, None)


@dataclass(frozen=True)
class Prefix:
    """The reusable prefix of a sequence.

    Attributes:
        seq_id: number of the sequence.
        token_ids: token ids of the positions that every layer has run.
    """

    seq_id: int
    token_ids: tuple[int, ...]


@dataclass
class PrefixCache:
    """The finished sequences whose KV is kept for reuse.

    Attributes:
        max_num_seqs: maximum number of kept sequences; 0 disables prefix caching, also between running sequences.
        window: the model's smallest sliding window; None without any.
    """

    max_num_seqs: int = 0
    window: int | None = None
    _kept: dict[int, Prefix] = field(default_factory=dict)

    @property
    def seq_ids(self) -> list[int]:
        """Numbers of the kept sequences, least recently used first."""
        return list(self._kept)

    def keep(self, prefix: Prefix) -> list[int]:
        """Keep a finished sequence.

        Returns:
            The numbers of the evicted sequences, which may include this one.
        """
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
        """The longest common prefix of ``token_ids[:-1]`` with a kept or running sequence.

        None if it is shorter than ``MIN_PREFIX``.
        """
        found, wanted = None, token_ids[:-1]
        if self.max_num_seqs == 0 or len(wanted) < MIN_PREFIX:
            return None
        for each in (*self._kept.values(), *running):
            pairs = zip(each.token_ids, wanted, strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if shared >= MIN_PREFIX and self._serves(each, shared) and (found is None or shared > len(found.token_ids)):
                found = Prefix(each.seq_id, each.token_ids[:shared])
        if found is not None and found.seq_id in self._kept:
            self._kept[found.seq_id] = self._kept.pop(found.seq_id)
        return found

    def evict(self) -> int:
        """Remove the least recently used sequence and return its number."""
        seq_id = next(iter(self._kept))
        del self._kept[seq_id]
        return seq_id

    def _covers(self, prefix: Prefix, other: Prefix) -> bool:
        """Whether ``prefix`` can replace ``other``."""
        length = len(other.token_ids)
        return prefix.token_ids[:length] == other.token_ids and self._serves(prefix, length)

    def _serves(self, prefix: Prefix, length: int) -> bool:
        """Whether a sequence still has the KV that a token after the first ``length`` positions attends to.

        With a sliding window, a layer drops positions before the window of its newest token.
        """
        complete = len(prefix.token_ids)
        return self.window is None or complete <= self.window or length >= complete - 1


@dataclass
class KVCacheManager:
    """Opens, copies and closes the KV caches of sequences on all stages, within the budget.

    Attributes:
        stages: the pipeline stages.
        budget: KV memory.
        prefixes: finished sequences whose KV is kept. They are evicted when memory is needed.
    """

    stages: Sequence[StageWorker]
    budget: KVBudget
    prefixes: PrefixCache = field(default_factory=PrefixCache)

    def open(
        self, seq_id: int, limit: int, length: int, token_ids: Sequence[int], running: Iterable[Prefix]
    ) -> int | None:
        """Create the caches of a new sequence, with the longest prefix that another one can give.

        Args:
            seq_id: number of the sequence.
            limit: maximum number of positions.
            length: number of positions to claim memory for.
            token_ids: of the positions whose KV may be copied, and one more.
            running: prefixes of running sequences.

        Returns:
            The number of copied positions; None if there is not enough memory.
        """
        fits = self.budget.claim(seq_id, limit, length)
        if not fits and not self.prefixes.seq_ids:  # nothing to evict
            return None
        source = self.prefixes.longest(token_ids, running)  # before evicting: it becomes the most recently used
        if not fits and not self.claim(seq_id, limit, length):
            return None
        for stage in self.stages:
            stage.open(seq_id, limit)
        if source is None or not self.budget.holds(source.seq_id):  # evicted after all
            return 0
        self.copy(source.seq_id, seq_id, len(source.token_ids))
        return len(source.token_ids)

    def claim(self, seq_id: int, limit: int, length: int) -> bool:
        """Claim memory for ``length`` positions of a sequence, evicting kept ones if needed; False if it is full."""
        while not self.budget.claim(seq_id, limit, length):
            if not self.prefixes.seq_ids:
                return False
            self.close(self.prefixes.evict())
        return True

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of ``source`` into the empty sequence ``target``."""
        for stage in self.stages:
            stage.copy(source, target, length)

    def crop(self, seq_id: int, length: int) -> None:
        """Remove the positions of a sequence from ``length`` on. They stay claimed."""
        for stage in self.stages:
            stage.crop(seq_id, length)

    def keep(self, prefix: Prefix) -> None:
        """Keep the caches of a finished sequence for others if possible, else close them."""
        evicted = self.prefixes.keep(prefix)
        if prefix.seq_id not in evicted:
            for stage in self.stages:
                stage.keep(prefix.seq_id, len(prefix.token_ids))
        for seq_id in evicted:
            self.close(seq_id)

    def close(self, seq_id: int) -> None:
        """Delete the caches of a sequence."""
        for stage in self.stages:
            stage.close(seq_id)
        self.budget.release(seq_id)
