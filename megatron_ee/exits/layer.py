"""Body ``layer``: N(Layer(h_k)). The layer starts as a copy of the last backbone layer.

The exit is a model of k + 1 layers. Its attention has its own KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_ee.config.architecture import Architecture
from megatron_ee.exits.body import Body, ExitPart, GraphBytes, LayerBytes, layer_parts, norm_part
from megatron_ee.exits.fit import ProjectionFit
from megatron_ee.exits.mlp import mlp_graph_bytes
from megatron_ee.exits.norm import norm_graph_bytes
from megatron_ee.model.layer import DecoderLayer
from megatron_ee.model.linear import RMSNorm
from megatron_ee.parallel.costs import attention_flops, mlp_flops

if TYPE_CHECKING:
    from megatron_ee.model.attention import LayerCache, Positions
    from megatron_ee.model.setup import ModelSetup


class LayerBody(Body):
    """``N(Layer(h_k))``. The layer has the attention window of the last layer, since it is a copy of it."""

    saved = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "norm"}) | frozenset(
        {"pre_feedforward_layernorm", "post_feedforward_layernorm"}  # of some families
    )
    extra_layers = 1

    def __init__(self, setup: ModelSetup, layer: int) -> None:
        super().__init__(setup, layer)
        self.layer = DecoderLayer(setup, setup.architecture.num_layers)
        self.norm = RMSNorm(setup, setup.architecture.hidden_size)

    @classmethod
    def parts(cls, architecture: Architecture, layer: int) -> Iterator[ExitPart]:
        """The layer and the norm."""
        origin, plain = architecture.num_layers, layer + 1
        yield from layer_parts(architecture, layer, origin=origin, plain=plain, module="layer.")
        yield norm_part(architecture, layer)

    @classmethod
    def windows(cls, architecture: Architecture) -> tuple[int | None, ...]:
        """The window of its one layer."""
        return architecture.windows[-1:]

    @classmethod
    def fitted_rows(cls, architecture: Architecture) -> int:
        """Of its MLP's down projection."""
        return architecture.ffn_size + architecture.mlp_bias

    @classmethod
    def forward_flops(cls, architecture: Architecture, tokens: int) -> int:
        """Of the layer."""
        return attention_flops(architecture, architecture.num_layers, tokens) + mlp_flops(architecture, tokens)

    @classmethod
    def flops(cls, architecture: Architecture, tokens: int) -> int:
        """Three times the forward. Its norms are trained too, so every matrix product has both gradients."""
        return 3 * cls.forward_flops(architecture, tokens)

    @classmethod
    def ring_passes(cls, sequence_parallel: bool) -> int:
        """Each half all-reduces its output, and its input's gradient. With sequence parallelism it gathers its input,
        again in backward, and the output's gradient; it scatters the output and the input's gradient."""
        return 10 if sequence_parallel else 8

    @classmethod
    def graph_bytes(cls, sizes: LayerBytes) -> GraphBytes:
        """As for an ``mlp`` body; and in attention what its norms and linears read, queries and keys as they were
        projected (with the values) and turned, and the context twice. Norms over whole projections keep queries and
        keys twice in float32. With a soft cap, backward computes the scores of a block again: capped, after the
        softmax, and their gradients in float32.
        """
        features, mlp = norm_graph_bytes(sizes), mlp_graph_bytes(sizes)
        norms = sizes.normed + sizes.wide + sizes.post_normed
        attention = sizes.hidden + norms + sizes.gathered + 4 * sizes.query + 3 * sizes.key + 2 * sizes.wide_heads
        capped = sizes.hidden + sizes.wide + sizes.gathered + 3 * sizes.query + 5 * sizes.key + 7 * sizes.scores // 2
        backward = max(attention + mlp.backward + features.backward, capped)
        return GraphBytes(features.kept + mlp.kept + attention, backward)

    def attention_half(self, tap: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """See ``Body``."""
        return self.layer.attention_half(tap, positions, cache)

    def rest(self, x: Tensor) -> Tensor:
        """See ``Body``."""
        return self.norm(self.layer.mlp_half(x))

    def fit(self, setup: ModelSetup) -> ProjectionFit:
        """Of its MLP's down projection, behind its copied attention."""
        layer = self.layer
        return ProjectionFit(setup, layer.mlp, layer.mlp_norm, layer.mlp_post_norm, layer.multiplier)


BODY = LayerBody
