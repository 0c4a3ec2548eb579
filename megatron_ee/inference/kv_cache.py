"""The keys and values that one layer keeps between passes."""

from __future__ import annotations

from torch import Tensor

CHUNK = 256


class LayerKV:
    """Growing cache of one attention layer, a ``LayerCache``.

    Room is taken ahead and at least doubled when it runs out, so that a token costs no copy of those before it. Layers
    differ in length: a deeper one lacks the deferred tokens.

    Attributes:
        length: positions kept, 0 .. ``length - 1``.
        limit: positions that will ever be kept; room beyond it is not taken.
    """

    def __init__(self, limit: int) -> None:
        self.length, self.limit = 0, limit
        self._kept: tuple[Tensor, Tensor] | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``[batch, kv_heads, new, head_dim]`` and return all that is kept, as ``kept`` does.

        Views, valid until the next call.
        """
        start, stop = self.length, self.length + key.shape[2]
        assert stop <= self.limit, f"{stop} positions in a cache for {self.limit}"
        if self._kept is None or self._kept[0].shape[2] < stop:
            self._grow(key, stop)
        assert self._kept is not None
        for kept, new in zip(self._kept, (key, value), strict=True):
            kept[:, :, start:stop] = new
        self.length = stop
        return self.kept()

    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[batch, kv_heads, length, head_dim]`` each."""
        assert self._kept is not None, "nothing is kept yet"
        key, value = self._kept
        return key[:, :, : self.length], value[:, :, : self.length]

    def _grow(self, like: Tensor, least: int) -> None:
        """Room for ``least`` positions or more, with what is kept moved there."""
        room = min(self.limit, max(-(-least // CHUNK) * CHUNK, 2 * self.length))
        shape = (*like.shape[:2], room, like.shape[3])
        larger = (like.new_empty(shape), like.new_empty(shape))
        if self._kept is not None:
            for old, new in zip(self._kept, larger, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        self._kept = larger
