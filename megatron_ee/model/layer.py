"""One decoder layer, in two halves that exits tap: the attention half returns the residual r, the MLP half h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ee.model.attention import Attention, LayerCache, Positions
from megatron_ee.model.linear import ColumnLinear, RMSNorm, RowLinear

if TYPE_CHECKING:
    from megatron_ee.model.setup import ModelSetup


class MLP(nn.Module):
    """Gated MLP: ``down(act(gate x) * up x)``. The fused rows of a rank are its gate rows, then its up rows."""

    def __init__(self, setup: ModelSetup) -> None:
        super().__init__()
        arch = setup.architecture
        self.activation = arch.activation
        self.gate_up = ColumnLinear(setup, arch.hidden_size, 2 * arch.ffn_size, bias=arch.mlp_bias)
        self.down = RowLinear(setup, arch.ffn_size, arch.hidden_size, bias=arch.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[seq, batch, hidden]`` -> the same shape."""
        return self.down(self.activated(x))

    def activated(self, x: Tensor) -> Tensor:
        """``[seq, batch, hidden]`` -> the input of ``down``, ``[seq, batch, ffn / tp]``.

        With sequence parallelism ``x`` is a share of seq, and the result has all of it.
        """
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        if self.activation == "gelu_tanh":
            active = F.gelu(gate, approximate="tanh")
        else:
            active = F.silu(gate, inplace=not gate.requires_grad)
        return active * up if gate.requires_grad else active.mul_(up)


class DecoderLayer(nn.Module):
    """Decoder layer of the backbone and of ``layer`` exits.

    Each half adds attention or MLP to the residual, with a norm before it, after it, or both.
    """

    def __init__(self, setup: ModelSetup, number: int) -> None:
        """Allocate layer ``number`` (from 1), which determines the attention window and the rotary embedding."""
        super().__init__()
        self.multiplier = setup.architecture.residual_multiplier
        self.attention_norm, self.attention_post_norm = build_norms(setup)
        self.attention = Attention(setup, number)
        self.mlp_norm, self.mlp_post_norm = build_norms(setup)
        self.mlp = MLP(setup)

    def attention_half(self, h: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """h ``[seq, batch, hidden]`` -> r, the residual after attention."""
        x = h if self.attention_norm is None else self.attention_norm(h)
        return residual_sum(h, self.attention(x, positions, cache), self.attention_post_norm, self.multiplier)

    def mlp_half(self, r: Tensor) -> Tensor:
        """r ``[seq, batch, hidden]`` -> h of the next layer."""
        return add_mlp(r, self.mlp_norm, self.mlp, self.mlp_post_norm, self.multiplier)

    def forward(self, h: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """Both halves: ``[seq, batch, hidden]`` -> the same shape."""
        return self.mlp_half(self.attention_half(h, positions, cache))


def build_norms(setup: ModelSetup) -> tuple[RMSNorm | None, RMSNorm | None]:
    """Build the norms before and after attention or MLP; None for one that the family lacks."""
    arch = setup.architecture
    return (
        RMSNorm(setup, arch.hidden_size) if arch.norms_before else None,
        RMSNorm(setup, arch.hidden_size) if arch.norms_after else None,
    )


def add_mlp(r: Tensor, before: nn.Module | None, mlp: MLP, after: nn.Module | None, multiplier: float) -> Tensor:
    """MLP half of a layer: r ``[seq, batch, hidden]`` -> h of the same shape.

    Args:
        r: the residual after attention.
        before: norm before the MLP; None for none.
        mlp: the MLP.
        after: norm after the MLP; None for none.
        multiplier: factor of the MLP's output.
    """
    return residual_sum(r, mlp(r if before is None else before(r)), after, multiplier)


def residual_sum(residual: Tensor, x: Tensor, norm: nn.Module | None, multiplier: float) -> Tensor:
    """``residual + multiplier * norm(x)``."""
    x = x if norm is None else norm(x)
    return residual + x if multiplier == 1 else torch.add(residual, x, alpha=multiplier)
