"""Attention: rotary positions, causal and sliding windows, padding, and the KV cache, for training and inference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ee.config.architecture import Rope
from megatron_ee.parallel.tiles import WINDOW_QUERIES

if TYPE_CHECKING:
    from megatron_ee.model.setup import ModelSetup


class LayerCache(Protocol):
    """Where one layer keeps keys and values between passes, of one row or of several that run together."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """Append the new tokens' keys and values, and attend to all that is kept.

        Args:
            query: ``[tokens, kv_heads, queries per key-value head, head_dim]``, the rows' tokens one after another.
            key: ``[tokens, kv_heads, head_dim]``.
            value: as ``key``.
            window: positions that a token sees, itself included; None for all before it.

        Returns:
            ``[tokens, heads * head_dim]``.
        """


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Inverse frequencies ``[head_dim / 2]``, float32, after linear or Llama 3 scaling (Llama 3.1 release notes)."""
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind != "llama3":
        return inverse
    wavelength = 2 * math.pi / inverse
    # 0 where a wavelength is scaled fully, 1 where it stays, linear in between.
    kept = (rope.original_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    kept = kept.clamp(0, 1)
    return kept * inverse + (1 - kept) * inverse / rope.factor


@dataclass
class Positions:
    """What attention must know of the tokens in one pass; built once and read by every layer.

    Attributes:
        cos: ``[seq, batch or 1, 1, 1, head_dim]`` in the model's dtype.
        sin: as ``cos``.
        length: tokens of each row. A pass over a cache, which knows itself what each token sees, has none.
        key_valid: ``[batch, length]``, False at padding; None where there is none.
    """

    cos: Tensor
    sin: Tensor
    length: int = 0
    key_valid: Tensor | None = None
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    _bands: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def band(self, window: int, shared: int) -> Tensor:
        """What consecutive queries add to their scores with the keys from ``window`` before the first one: 0 or -inf.

        Args:
            window: positions that a token sees, itself included; fewer than ``length``.
            shared: queries of a token that share a key-value head, which follow one another.

        Returns:
            ``[queries * shared, queries + window]`` in the model's dtype, of as many queries as run together.
        """
        if (window, shared) not in self._bands:
            queries = min(WINDOW_QUERIES, self.length - window)
            key = torch.arange(queries + window, device=self.cos.device)
            hidden = ~visible_keys(key[window:], key, window).repeat_interleave(shared, dim=0)
            scores = torch.zeros(hidden.shape, dtype=self.cos.dtype, device=hidden.device)
            self._bands[window, shared] = scores.masked_fill_(hidden, -torch.inf)
        return self._bands[window, shared]

    def mask(self, window: int | None) -> Tensor | None:
        """Which keys each query sees, ``[batch or 1, 1, length, length]`` bool; None where causal order will do."""
        if window is not None and window >= self.length:
            window = None
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> Tensor | None:
        if self.key_valid is None and window is None:
            return None
        key = torch.arange(self.length, device=self.cos.device)
        visible = visible_keys(key, key, window)
        if self.key_valid is None:
            return visible[None, None]
        # A padding query sees itself alone: an empty row would be NaN and spread.
        return ((visible & self.key_valid[:, None, :]) | (key == key[:, None]))[:, None]


def visible_keys(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether a query at each position of ``query`` sees each key, by positions: bool ``[queries, keys]``."""
    visible = key <= query[:, None]
    if window is not None:
        visible &= key > query[:, None] - window
    return visible


def make_positions(
    inverse_frequencies: Tensor, dtype: torch.dtype, length: int, key_valid: Tensor | None = None
) -> Positions:
    """Positions of whole rows.

    Args:
        inverse_frequencies: from ``rope_frequencies``, on the device of the model.
        dtype: the model's.
        length: tokens of each row.
        key_valid: ``[batch, length]`` bool. Rows are padded on either side; a padded row's positions count its
            valid tokens only, as transformers counts them.
    """
    steps = torch.arange(length, device=inverse_frequencies.device)[None]
    counted = steps if key_valid is None else (key_valid.long().cumsum(1) - 1).clamp(min=0)
    return Positions(*_rotary(inverse_frequencies, dtype, counted.t()), length, key_valid)


def packed_positions(inverse_frequencies: Tensor, dtype: torch.dtype, positions: Tensor) -> Positions:
    """Positions of a pass over caches: the rows' tokens one after another, ``positions`` ``[tokens]`` int64."""
    return Positions(*_rotary(inverse_frequencies, dtype, positions[:, None]))


def _rotary(inverse_frequencies: Tensor, dtype: torch.dtype, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine at ``positions`` ``[seq, batch or 1]``."""
    angles = positions[:, :, None].float() * inverse_frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, :, None, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """Grouped-query self-attention over tensor-parallel heads.

    The fused projection's rows are grouped by key-value head: its query heads, its key, its value.
    """

    def __init__(self, setup: ModelSetup, window: int | None) -> None:
        super().__init__()
        arch, spec = setup.architecture, setup.spec
        self.window, self.head_dim = window, arch.head_dim
        self.queries_per_group = arch.num_heads // arch.num_kv_heads
        self.repeats_keys = setup.repeats_keys and self.queries_per_group > 1
        rows = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
        self.qkv = spec.column(setup, arch.hidden_size, rows, bias=arch.qkv_bias)
        self.output = spec.row(setup, arch.num_heads * arch.head_dim, arch.hidden_size, bias=arch.output_bias)
        self.q_layernorm = self.k_layernorm = None
        if arch.qk_norm:
            # On heads, of which every rank has its own: megatron-core sums their gradients over ranks by these names.
            self.q_layernorm = spec.norm(setup, arch.head_dim, sharded_sequence=False)
            self.k_layernorm = spec.norm(setup, arch.head_dim, sharded_sequence=False)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """``[seq, batch, hidden]`` -> the same shape: the attention's output before the residual is added."""
        query, key, value = self.project(x, positions)
        seq, batch = query.shape[:2]
        if cache is not None:
            context = cache.attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), self.window)
            return self.output(context.view(seq * batch, 1, -1))
        return self.output(self._attend(query, key, value, positions))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions) -> Tensor:
        """Context ``[seq, batch, heads * head_dim]`` of what ``project`` gives for whole rows."""
        seq, shared = len(query), self.queries_per_group
        if positions.key_valid is not None:
            mask = positions.mask(self.window)
            assert mask is not None, "padded rows have a mask"
            return _attend_masked(query, key, value, mask.repeat_interleave(shared, dim=2))
        window = seq if self.window is None else min(self.window, seq)
        # A mask takes memory and rules out the fastest kernels. The first tokens see all before them and need none;
        # the others go block by block, each with the keys that one of them sees.
        parts = [self._attend_causal(query[:window], key[:window], value[:window])]
        for start in range(window, seq, WINDOW_QUERIES):
            stop = min(start + WINDOW_QUERIES, seq)
            seen, count = slice(start - window, stop), stop - start
            band = positions.band(window, shared)[: count * shared, : count + window]
            parts.append(_attend_masked(query[start:stop], key[seen], value[seen], band))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.repeats_keys:
            key, value = (each.repeat_interleave(self.queries_per_group, dim=2) for each in (key, value))
        context = F.scaled_dot_product_attention(
            query.flatten(2, 3).permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=len(query) > 1,
            enable_gqa=self.queries_per_group > 1 and not self.repeats_keys,
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[seq, batch, kv_heads, queries per group, head_dim]`` of ``[seq, batch, hidden]``, keys and values.

        The latter ``[seq, batch, kv_heads, head_dim]``. All but the values are rotated.
        """
        qkv = self.qkv(x)
        seq, batch, _ = qkv.shape
        qkv = qkv.view(seq, batch, -1, self.queries_per_group + 2, self.head_dim)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = qkv[..., :-2, :], qkv[..., -2:-1, :]
            rotated = rotate(torch.cat((self.q_layernorm(query), self.k_layernorm(key)), dim=-2), positions)
        else:
            rotated = rotate(qkv[..., :-1, :], positions)
        return rotated[..., :-1, :], rotated[..., -1, :], qkv[..., -1, :]


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention with a mask, by a kernel that does without the scores of all queries and keys.

    Such kernels want as many key-value heads as there are query heads. The queries that share one go as further tokens
    of it: nothing is copied for them but the queries.

    Args:
        query: ``[queries, batch, kv_heads, queries per key-value head, head_dim]``.
        key: ``[keys, batch, kv_heads, head_dim]``; ``value`` too.
        mask: broadcast to ``[batch, kv_heads, queries * queries per key-value head, keys]``; bool, or added.

    Returns:
        ``[queries, batch, heads * head_dim]``.
    """
    folded = query.permute(1, 2, 0, 3, 4).flatten(2, 3)
    context = F.scaled_dot_product_attention(folded, key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), mask)
    return context.unflatten(2, (len(query), -1)).permute(2, 0, 1, 3, 4).flatten(2)


def rotate(x: Tensor, positions: Positions) -> Tensor:
    """Rotary embedding (arXiv 2104.09864), halves rotated as in released Llama.

    ``[seq, batch, kv_heads, heads per group, head_dim]`` -> the same shape.
    """
    first, second = x.chunk(2, dim=-1)
    # Both halves turn by the same angles. Put together last: what the compiler has to write it does not compute again.
    cos, sin = positions.cos.chunk(2, dim=-1)[0], positions.sin.chunk(2, dim=-1)[0]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
