"""Attention: rotary positions, causal and sliding windows, padding, and the KV cache, for training and inference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ee.config.architecture import Rope

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
        mask = positions.mask(self.window)
        context = F.scaled_dot_product_attention(
            query.reshape(seq, batch, -1, self.head_dim).permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None and seq > 1,
            enable_gqa=self.queries_per_group > 1,
        )
        return self.output(context.permute(2, 0, 1, 3).reshape(seq, batch, -1))

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


def rotate(x: Tensor, positions: Positions) -> Tensor:
    """Rotary embedding (arXiv 2104.09864), halves rotated as in released Llama.

    ``[seq, batch, kv_heads, heads per group, head_dim]`` -> the same shape.
    """
    first, second = x.chunk(2, dim=-1)
    # Both halves turn by the same angles. Put together last: what the compiler has to write it does not compute again.
    cos, sin = positions.cos.chunk(2, dim=-1)[0], positions.sin.chunk(2, dim=-1)[0]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
