"""One decoder layer, in the two halves that exits tap: attention gives the residual r, the MLP gives h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ee.model.attention import Attention, LayerCache, Positions

if TYPE_CHECKING:
    from megatron_ee.model.setup import ModelSetup


class MLP(nn.Module):
    """Gated MLP: ``down(silu(gate x) * up x)``. A rank's fused rows are its gate rows, then its up rows."""

    def __init__(self, setup: ModelSetup) -> None:
        super().__init__()
        arch, spec = setup.architecture, setup.spec
        self.gate_up = spec.column(setup, arch.hidden_size, 2 * arch.ffn_size, bias=arch.mlp_bias)
        self.down = spec.row(setup, arch.ffn_size, arch.hidden_size, bias=arch.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[seq, batch, hidden]`` -> the same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        if gate.requires_grad:
            return self.down(F.silu(gate) * up)
        return self.down(F.silu(gate, inplace=True).mul_(up))


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer of the Llama kind; backbone layers and ``layer`` exits are this one class."""

    def __init__(self, setup: ModelSetup, number: int) -> None:
        """Layer ``number``, from 1; it decides the attention window."""
        super().__init__()
        arch = setup.architecture
        self.attention_norm = setup.spec.norm(setup, arch.hidden_size)
        self.attention = Attention(setup, arch.windows[number - 1])
        self.mlp_norm = setup.spec.norm(setup, arch.hidden_size)
        self.mlp = MLP(setup)

    def attention_half(self, h: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """h ``[seq, batch, hidden]`` -> r, the residual after attention."""
        return h + self.attention(self.attention_norm(h), positions, cache)

    def mlp_half(self, r: Tensor) -> Tensor:
        """r ``[seq, batch, hidden]`` -> h of the next layer."""
        return r + self.mlp(self.mlp_norm(r))

    def forward(self, h: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """Both halves: ``[seq, batch, hidden]`` -> the same shape."""
        return self.mlp_half(self.attention_half(h, positions, cache))
