"""The KV cache, and attention over it.

Each layer of each sequence has its own cache, which grows by ``CHUNK`` positions. So no memory is reserved for the
maximum length. Copying a cache when it grows costs little compared to what attention reads in the meantime. The layers
of a sequence have different lengths: deeper layers lack the deferred tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ee.model.attention import attend_soft_capped, visible_keys

CHUNK = 256


class MaskKey(NamedTuple):
    """What the attention mask of one sequence depends on.

    Attributes:
        start: position of the first query.
        length: of the sequence.
        first: position of the first key.
        window: the sliding window; None for no window.
    """

    start: int
    length: int
    first: int
    window: int | None


Masks = dict[MaskKey, Tensor]
"""Attention masks of a pass, shared by its layers."""


@dataclass(frozen=True)
class Extent:
    """Number of positions that a layer keeps.

    Attributes:
        limit: maximum length of the sequence.
        window: positions that a token attends to, including itself; None for all earlier positions.
        slack: additional positions kept before the window, because tokens may be deferred or cropped.
        pass_tokens: maximum number of tokens in a pass.
    """

    limit: int
    window: int | None = None
    slack: int = 0
    pass_tokens: int = CHUNK

    def room(self, length: int) -> int:
        """Number of allocated positions for a sequence of ``length`` positions."""
        room = min(self.limit, _chunks(length))
        if self.window is None:
            return room
        return min(room, _chunks(self.window + self.slack + self.pass_tokens))


class LayerKV:
    """The growing KV cache of one attention layer of one sequence.

    Attributes:
        length: positions run so far.
        first: first position that is still kept; above 0 only with a sliding window.
    """

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.length = self.first = 0
        self._kept: tuple[Tensor, Tensor] | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``key`` and ``value``, ``[new, kv_heads, head_dim]`` each.

        Returns:
            As ``kept``: views that are valid until the next call.
        """
        new = key.shape[0]
        stop = self.length + new
        assert stop <= self.extent.limit, f"{stop} positions in a cache for {self.extent.limit}"
        if self._kept is None or self._kept[0].shape[2] < stop - self.first:
            self._grow(key, stop)
        assert self._kept is not None
        start, self.length = self.length - self.first, stop
        keys, values = self._kept
        if new == 1:
            keys[0, :, start] = key[0]
            values[0, :, start] = value[0]
        else:
            keys[0, :, start : start + new] = key.transpose(0, 1)
            values[0, :, start : start + new] = value.transpose(0, 1)
        return self.kept()

    def room(self, new: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of all allocated positions, ``[1, kv_heads, room, head_dim]`` each.

        None if there is no room for ``new`` tokens and one more (a full cache would need other compiled code), or if
        a token would not attend to all kept positions.
        """
        stop, window = self.length + new, self.extent.window
        if self._kept is None or self.first > 0 or (window is not None and stop > window):
            return None
        return self._kept if stop < self._kept[0].shape[2] else None

    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values of positions ``first .. length - 1``, ``[1, kv_heads, kept, head_dim]`` each."""
        assert self._kept is not None, "nothing is kept yet"
        key, value = self._kept
        stop = self.length - self.first
        return key[:, :, :stop], value[:, :, :stop]

    def crop(self, length: int) -> None:
        """Remove the positions from ``length`` on."""
        assert self.first <= length, f"position {length} is no longer kept"
        self.length = min(self.length, length)

    def begin(self, other: LayerKV, length: int) -> None:
        """Copy the first ``length`` positions of another cache into this empty one."""
        assert self.length == 0 and other.first <= length <= other.length, "no such positions to begin with"
        if length == 0:
            return
        count = length - other.first
        room = max(self.extent.room(length), count)
        copies = []
        for theirs in other.kept():
            mine = theirs.new_empty((1, theirs.shape[1], room, theirs.shape[3]))
            mine[:, :, :count] = theirs[:, :, :count]
            copies.append(mine)
        self.first, self.length, self._kept = other.first, length, (copies[0], copies[1])

    def _grow(self, like: Tensor, stop: int) -> None:
        """Allocate room for the positions up to ``stop``. Copies the kept positions that are still in the window."""
        extent, first = self.extent, self.first
        if extent.window is not None:
            first = max(first, self.length - extent.window - extent.slack)
        room = max(extent.room(stop), stop - first)
        larger = [like.new_empty((1, like.shape[1], room, like.shape[2])) for _ in range(2)]
        if self._kept is not None:
            begin, end = first - self.first, self.length - self.first
            for old, new in zip(self._kept, larger, strict=True):
                new[:, :, : end - begin] = old[:, :, begin:end]
        self.first, self._kept = first, (larger[0], larger[1])


def _chunks(length: int) -> int:
    return -(-length // CHUNK) * CHUNK


@dataclass
class PackedCaches:
    """The ``LayerCache`` of a pass: one layer's caches of all sequences, whose tokens are packed along one dimension.

    Attributes:
        caches: one per sequence.
        counts: number of tokens of each sequence in this pass.
        masks: masks made so far in this pass, shared by its layers.
    """

    caches: Sequence[LayerKV]
    counts: Sequence[int]
    masks: Masks = field(default_factory=dict)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, soft_cap: float | None = None
    ) -> Tensor:
        """See ``LayerCache``."""
        if len(self.caches) == 1:
            return self._attend(self.caches[0], query, key, value, window, soft_cap)
        counts = list(self.counts)
        parts = zip(self.caches, query.split(counts), key.split(counts), value.split(counts), strict=True)
        return torch.cat([self._attend(*part, window, soft_cap) for part in parts])

    def _attend(
        self,
        cache: LayerKV,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        """Attention of one sequence, ``[tokens, heads * head_dim]``."""
        start, count = cache.length, len(query)
        keys, values = cache.extend(key, value)
        if soft_cap is not None:
            keys, values = keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)
            return attend_soft_capped(query[:, None], keys, values, soft_cap, window)[:, 0]
        if count == 1:
            if window is not None:
                keys, values = keys[:, :, -window:], values[:, :, -window:]
            return attend_together(query, keys, values, None)
        if start == 0 and (window is None or count <= window):
            # A whole prompt: causal attention needs no mask tensor and skips the masked part.
            heads = query.flatten(1, 2).transpose(0, 1)[None]
            shared = query.shape[2] > 1
            context = F.scaled_dot_product_attention(heads, keys, values, is_causal=True, enable_gqa=shared)
            return context[0].transpose(0, 1).reshape(count, -1)
        mask = shared_mask(self.masks, MaskKey(start, cache.length, cache.first, window), query, query.shape[2])
        return attend_together(query, keys, values, mask)


def attend_together(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention of one sequence's tokens.

    Query heads that share a key-value head are passed as additional tokens of it, so the cache is not copied.

    Args:
        query: ``[tokens, kv_heads, queries per key-value head, head_dim]``.
        keys: ``[1, kv_heads, kept, head_dim]``.
        values: as ``keys``.
        mask: from ``shared_mask``; None if every query attends to all keys.

    Returns:
        ``[tokens, heads * head_dim]``.
    """
    count, shared, _, size = query.shape
    heads = query.transpose(0, 1).reshape(1, shared, -1, size)
    context = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask)
    return context.reshape(shared, count, -1).transpose(0, 1).reshape(count, -1)


def shared_mask(masks: Masks, key: MaskKey, like: Tensor, heads: int) -> Tensor:
    """The additive attention mask: 0, or -inf for a masked key. Made once per pass.

    Args:
        masks: of the pass.
        key: positions of the queries and keys, and the window.
        like: a tensor of the mask's dtype and device.
        heads: number of query heads that share a key-value head; the rows of one query are adjacent.

    Returns:
        ``[queries * heads, keys]``.
    """
    if key not in masks:
        positions = torch.arange(key.first, key.length, device=like.device)
        visible = visible_keys(positions[key.start - key.first :], positions, key.window)
        mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
        masks[key] = mask.masked_fill_(~visible, -torch.inf).repeat_interleave(heads, dim=0)
    return masks[key]
