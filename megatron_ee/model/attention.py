"""Attention for training and inference: rotary positions, causal and sliding-window masks, padding, KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ee.config.architecture import Architecture, Rope
from megatron_ee.model.linear import ColumnLinear, RMSNorm, RowLinear, ShardedRMSNorm
from megatron_ee.parallel.tiles import WINDOW_QUERIES

if TYPE_CHECKING:
    from megatron_ee.model.setup import ModelSetup


class LayerCache(Protocol):
    """The KV cache of one layer, for one sequence or for several packed sequences."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, soft_cap: float | None = None
    ) -> Tensor:
        """Append the new tokens' keys and values, and attend to the whole cache.

        Args:
            query: ``[tokens, kv_heads, queries per key-value head, head_dim]``, with the sequences concatenated.
            key: ``[tokens, kv_heads, head_dim]``.
            value: as ``key``.
            window: positions that a token attends to, including itself; None for all earlier positions.
            soft_cap: soft cap of the scores; None for none.

        Returns:
            ``[tokens, heads * head_dim]``.
        """


@dataclass(frozen=True)
class Rotary:
    """The frequencies of one rotary embedding.

    Attributes:
        short: inverse frequencies ``[rotated features / 2]``, float32, for rows of at most ``limit`` positions.
        long: the same for longer rows.
        limit: see ``short``.
        magnitude: factor of cosine and sine.
        query_scaling: see ``Rope``.
        query_span: its ``original_positions``.
    """

    short: Tensor
    long: Tensor
    limit: int
    magnitude: float
    query_scaling: float = 0.0
    query_span: int = 1

    def query_scale(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Factor of the queries, ``[seq, batch, 1, 1, 1]``, at ``positions`` ``[seq, batch]``; None for 1."""
        if self.query_scaling == 0:
            return None
        scale = 1 + self.query_scaling * torch.log(1 + torch.floor(positions / self.query_span))
        return scale[:, :, None, None, None].to(dtype)

    def angles(self, positions: Tensor, dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each ``[seq, batch, 1, 1, n]``.

        Args:
            positions: ``[seq, batch]``.
            dtype: of the result.
            length: tokens per row, which selects ``short`` or ``long``.
        """
        inverse = self.long if length > self.limit else self.short
        angles = (positions[:, :, None].float() * inverse)[:, :, None, None]
        cos, sin = angles.cos(), angles.sin()
        if self.magnitude != 1:
            cos, sin = cos * self.magnitude, sin * self.magnitude
        return cos.to(dtype), sin.to(dtype)


def make_rotary(rope: Rope, head_dim: int, device: torch.device | None = None) -> Rotary:
    """Frequencies of ``rope`` for heads of ``head_dim`` features."""
    if rope.kind != "longrope":
        inverse = rope_frequencies(rope, head_dim).to(device)
        return Rotary(inverse, inverse, 0, rope.magnitude, rope.query_scaling, rope.original_positions)
    plain = rope_frequencies(replace(rope, kind="default"), head_dim)
    short, long = (plain / torch.tensor(factors) for factors in (rope.short_factors, rope.long_factors))
    return Rotary(short.to(device), long.to(device), rope.original_positions, rope.magnitude)


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Inverse frequencies ``[rotated features / 2]``, float32, with the scaling of every kind except longrope."""
    dim = int(head_dim * rope.fraction)
    inverse = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, inverse, dim)
    if rope.kind != "llama3":
        return inverse
    # Llama 3.1 release notes.
    wavelength = 2 * math.pi / inverse
    # 0 for a fully scaled wavelength, 1 for an unscaled one, linear in between.
    kept = (rope.original_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    kept = kept.clamp(0, 1)
    return kept * inverse + (1 - kept) * inverse / rope.factor


def _yarn_frequencies(rope: Rope, inverse: Tensor, dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): the scaling increases linearly between two features."""

    def feature(turns: float) -> float:
        """The feature index (a real number) that makes ``turns`` rotations within the original context."""
        return dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = feature(rope.beta_fast), feature(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    scaled = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return scaled * inverse / rope.factor + (1 - scaled) * inverse


@dataclass
class Positions:
    """Positions and masks of the tokens of one pass; built once and used by every layer.

    Attributes:
        angles: for each rotary embedding of the model, cosine and sine, each
            ``[seq, batch or 1, 1, 1, rotated features / 2]`` in the model's dtype.
        length: tokens per row; 0 in a pass over a cache, which does its own masking.
        key_valid: ``[batch, length]``, False at padding; None without padding.
        query_scale: factor of the queries, ``[seq, batch or 1, 1, 1, 1]`` in the model's dtype; None for 1.
    """

    angles: tuple[tuple[Tensor, Tensor], ...]
    length: int = 0
    key_valid: Tensor | None = None
    query_scale: Tensor | None = None
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    _bands: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def pick(self, spans: Sequence[slice]) -> Positions:
        """Select and concatenate spans of the tokens, for a pass over caches."""

        def picked(each: Tensor) -> Tensor:
            return each[spans[0]] if len(spans) == 1 else torch.cat([each[span] for span in spans])

        angles = tuple((picked(cos), picked(sin)) for cos, sin in self.angles)
        return Positions(angles, query_scale=None if self.query_scale is None else picked(self.query_scale))

    def band(self, window: int, shared: int) -> Tensor:
        """Additive mask, 0 or -inf, for a block of queries and the keys from ``window`` before the first query on.

        Args:
            window: positions that a token attends to, including itself; less than ``length``.
            shared: number of query heads that share a key-value head; the rows of one token are adjacent.

        Returns:
            ``[queries * shared, queries + window]`` in the model's dtype, for one block of queries.
        """
        if (window, shared) not in self._bands:
            queries = min(WINDOW_QUERIES, self.length - window)
            key = torch.arange(queries + window, device=self.angles[0][0].device)
            hidden = ~visible_keys(key[window:], key, window).repeat_interleave(shared, dim=0)
            scores = torch.zeros(hidden.shape, dtype=self.angles[0][0].dtype, device=hidden.device)
            self._bands[window, shared] = scores.masked_fill_(hidden, -torch.inf)
        return self._bands[window, shared]

    def mask(self, window: int | None) -> Tensor | None:
        """Bool mask of the visible keys, ``[batch or 1, 1, length, length]``; None if causal masking suffices."""
        if window is not None and window >= self.length:
            window = None
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> Tensor | None:
        if self.key_valid is None and window is None:
            return None
        key = torch.arange(self.length, device=self.angles[0][0].device)
        visible = visible_keys(key, key, window)
        if self.key_valid is None:
            return visible[None, None]
        # A padding query attends only to itself, because a fully masked row would give NaN.
        return ((visible & self.key_valid[:, None, :]) | (key == key[:, None]))[:, None]


def visible_keys(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Bool ``[queries, keys]``: whether the query attends to the key, from their positions and the sliding window."""
    visible = key <= query[:, None]
    if window is not None:
        visible &= key > query[:, None] - window
    return visible


def make_positions(
    rotaries: Sequence[Rotary], dtype: torch.dtype, length: int, key_valid: Tensor | None = None
) -> Positions:
    """Positions of whole rows.

    Args:
        rotaries: rotary embeddings of the model.
        dtype: dtype of the model.
        length: tokens per row.
        key_valid: ``[batch, length]`` bool, False at padding, which may be on either side. Positions count only valid
            tokens, as in transformers.
    """
    steps = torch.arange(length, device=rotaries[0].short.device)[None]
    counted = steps if key_valid is None else (key_valid.long().cumsum(1) - 1).clamp(min=0)
    angles = tuple(rotary.angles(counted.t(), dtype, length) for rotary in rotaries)
    return Positions(angles, length, key_valid, rotaries[0].query_scale(counted.t(), dtype))


def packed_positions(rotaries: Sequence[Rotary], dtype: torch.dtype, positions: Tensor) -> Positions:
    """Positions of a pass over caches, from ``positions`` ``[tokens]`` int64 of all sequences concatenated."""
    angles = tuple(rotary.angles(positions[:, None], dtype, 0) for rotary in rotaries)
    return Positions(angles, query_scale=rotaries[0].query_scale(positions[:, None], dtype))


def rotary_index(arch: Architecture, number: int) -> int | None:
    """Index of the rotary embedding of layer ``number`` (from 1); None for none."""
    if arch.rotated and not arch.rotated[number - 1]:
        return None
    return 1 if arch.local_rope is not None and arch.windows[number - 1] is not None else 0


class Attention(nn.Module):
    """Grouped-query self-attention over tensor-parallel heads.

    The rows of the fused projection are grouped by key-value head: its query heads, its key, its value.
    """

    def __init__(self, setup: ModelSetup, number: int) -> None:
        """Allocate the attention of layer ``number`` (from 1)."""
        super().__init__()
        arch = setup.architecture
        self.window, self.head_dim = arch.windows[number - 1], arch.head_dim
        self.rotary, self.soft_cap = rotary_index(arch, number), arch.attention_soft_cap
        # scaled_dot_product_attention already divides by sqrt(head_dim).
        asked = arch.attention_multiplier
        self.query_factor = 1.0 if asked is None else asked * arch.head_dim**0.5
        self.queries_per_group = arch.num_heads // arch.num_kv_heads
        self.repeats_keys = setup.repeats_keys and self.queries_per_group > 1
        rows = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
        self.qkv = ColumnLinear(setup, arch.hidden_size, rows, bias=arch.qkv_bias)
        self.output = RowLinear(setup, arch.num_heads * arch.head_dim, arch.hidden_size, bias=arch.output_bias)
        self.q_layernorm = self.k_layernorm = self.q_norm = self.k_norm = None
        if arch.qk_norm_whole:
            self.q_norm = ShardedRMSNorm(setup, arch.num_heads * arch.head_dim)
            self.k_norm = ShardedRMSNorm(setup, arch.num_kv_heads * arch.head_dim)
        elif arch.qk_norm:
            # Each rank applies them to its own heads. megatron-core recognises these names and sums the gradients.
            self.q_layernorm = RMSNorm(setup, arch.head_dim, sharded_sequence=False)
            self.k_layernorm = RMSNorm(setup, arch.head_dim, sharded_sequence=False)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """``[seq, batch, hidden]`` -> the same shape, without the residual."""
        query, key, value = self.project(x, positions)
        seq, batch = query.shape[:2]
        if cache is not None:
            tokens = query.flatten(0, 1)
            context = cache.attend(tokens, key.flatten(0, 1), value.flatten(0, 1), self.window, self.soft_cap)
            return self.output(context.view(seq * batch, 1, -1))
        return self.output(self._attend(query, key, value, positions))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions) -> Tensor:
        """Attention over whole rows, from the results of ``project``: ``[seq, batch, heads * head_dim]``."""
        seq, shared = len(query), self.queries_per_group
        if self.soft_cap is not None:
            return attend_soft_capped(query, key, value, self.soft_cap, self.window, positions.key_valid)
        if positions.key_valid is not None:
            mask = positions.mask(self.window)
            assert mask is not None, "padded rows have a mask"
            return _attend_masked(query, key, value, mask.repeat_interleave(shared, dim=2))
        window = seq if self.window is None else min(self.window, seq)
        # A mask takes memory and excludes the fastest kernels. The first ``window`` tokens attend to all earlier ones
        # and need no mask. The others run in blocks, with the keys in the window of any of their tokens.
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
        """Compute queries, keys and values. Queries and keys are rotated.

        Args:
            x: ``[seq, batch, hidden]``.
            positions: of the tokens.

        Returns:
            Queries ``[seq, batch, kv_heads, queries per group, head_dim]``, keys and values
            ``[seq, batch, kv_heads, head_dim]`` each.
        """
        qkv = self.qkv(x)
        seq, batch, _ = qkv.shape
        qkv = qkv.view(seq, batch, -1, self.queries_per_group + 2, self.head_dim)
        query_key, value = qkv[..., :-1, :], qkv[..., -1, :]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = qkv[..., :-2, :], qkv[..., -2:-1, :]
            query_key = torch.cat((self.q_layernorm(query), self.k_layernorm(key)), dim=-2)
        elif self.q_norm is not None and self.k_norm is not None:
            normed = (norm(part.flatten(2)).view(part.shape) for norm, part in self._whole_norms(qkv))
            query_key = torch.cat(tuple(normed), dim=-2)
        if self.rotary is not None:
            query_key = rotate(query_key, *positions.angles[self.rotary])
        query = query_key[..., :-1, :]
        if positions.query_scale is not None:
            query = query * positions.query_scale
        return query if self.query_factor == 1 else query * self.query_factor, query_key[..., -1, :], value

    def _whole_norms(self, qkv: Tensor) -> tuple[tuple[nn.Module, Tensor], tuple[nn.Module, Tensor]]:
        """The norms over whole projections, each with its input."""
        assert self.q_norm is not None and self.k_norm is not None, "no norms over whole projections"
        return (self.q_norm, qkv[..., :-2, :]), (self.k_norm, qkv[..., -2:-1, :])


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention with a mask, by a kernel that does not store all scores.

    Such kernels need as many key-value heads as query heads. So query heads that share a key-value head become
    additional tokens of it, and only the queries are copied.

    Args:
        query: ``[queries, batch, kv_heads, queries per key-value head, head_dim]``.
        key: ``[keys, batch, kv_heads, head_dim]``.
        value: as ``key``.
        mask: bool or additive, broadcast to ``[batch, kv_heads, queries * queries per key-value head, keys]``.

    Returns:
        ``[queries, batch, heads * head_dim]``.
    """
    folded = query.permute(1, 2, 0, 3, 4).flatten(2, 3)
    context = F.scaled_dot_product_attention(folded, key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), mask)
    return context.unflatten(2, (len(query), -1)).permute(2, 0, 1, 3, 4).flatten(2)


def attend_soft_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    soft_cap: float,
    window: int | None,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Causal attention with soft-capped scores, for which there is no fused kernel.

    Queries run in blocks, so that only one block's scores exist at a time. The backward pass recomputes them.

    Args:
        query: ``[queries, batch, kv_heads, queries per key-value head, head_dim]``, at the last positions of the keys.
        key: ``[keys, batch, kv_heads, head_dim]``.
        value: as ``key``.
        soft_cap: see ``Architecture``.
        window: positions that a token attends to, including itself; None for all earlier positions.
        key_valid: ``[batch, keys]``, False at padding; None without padding.

    Returns:
        ``[queries, batch, heads * head_dim]``.
    """
    before, parts = len(key) - len(query), []
    for start in range(0, len(query), WINDOW_QUERIES):
        stop = min(start + WINDOW_QUERIES, len(query))
        seen = slice(0 if window is None else max(0, before + start + 1 - window), before + stop)
        keys = torch.arange(seen.start, seen.stop, device=query.device)
        queries = keys[start - stop :]
        visible = visible_keys(queries, keys, window)
        if key_valid is not None:
            # A padding query attends only to itself, because a fully masked row would give NaN.
            visible = ((visible & key_valid[:, None, seen]) | (keys == queries[:, None]))[:, None, None]
        block = (query[start:stop], key[seen], value[seen], visible, soft_cap)
        if torch.is_grad_enabled() and query.requires_grad:
            parts.append(checkpoint(_attend_block, *block, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_attend_block(*block))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_block(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, soft_cap: float) -> Tensor:
    """Attention of one block; ``visible`` is broadcast to ``[batch, kv_heads, queries per kv head, queries, keys]``."""
    scores = torch.einsum("qbgsd,kbgd->bgsqk", query, key) * query.shape[-1] ** -0.5
    scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype)
    return torch.einsum("bgsqk,kbgd->qbgsd", weights, value).flatten(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding (arXiv 2104.09864), with feature i paired with i + n as in released Llama.

    Args:
        x: ``[seq, batch, kv_heads, heads per group, head_dim]``. Features after the first ``2 n`` are not rotated.
        cos: ``[seq, batch or 1, 1, 1, n]``.
        sin: as ``cos``.

    Returns:
        The shape of ``x``.
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    # Concatenating last makes compiled code compute the angles of both halves only once.
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned if rest.shape[-1] == 0 else (*turned, rest), dim=-1)
