"""Body ``mlp``: N(r_k + MLP(n(r_k))), where n is layer k's own pre-MLP norm, frozen.

The MLP starts as a copy of layer k's MLP, and replaces it: the exit is the first k layers with another last MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_ee.config.architecture import Architecture
from megatron_ee.exits.body import Body, ExitPart, GraphBytes, LayerBytes, layer_parts, norm_part
from megatron_ee.exits.norm import norm_graph_bytes
from megatron_ee.families.family import Source
from megatron_ee.families.weights import layer_source, parameter_parts
from megatron_ee.model.layer import MLP, add_mlp, build_norms
from megatron_ee.model.linear import RMSNorm
from megatron_ee.model.traversal import Tap

if TYPE_CHECKING:
    from megatron_ee.model.setup import ModelSetup


class MLPBody(Body):
    """``N(r_k + MLP(n(r_k)))``."""

    saved = frozenset({"mlp", "norm"})

    def __init__(self, setup: ModelSetup, layer: int) -> None:
        super().__init__(setup, layer)
        self.multiplier = setup.architecture.residual_multiplier
        self.input_norm, self.output_norm = build_norms(setup)
        for norm in filter(None, (self.input_norm, self.output_norm)):
            norm.requires_grad_(False)
        self.mlp = MLP(setup)
        self.norm = RMSNorm(setup, setup.architecture.hidden_size)

    @classmethod
    def taps(cls, layer: int) -> Mapping[int, Tap]:
        """r_k."""
        return {layer: "residual"}

    @classmethod
    def parts(cls, architecture: Architecture, layer: int) -> Iterator[ExitPart]:
        """The MLP and the norm."""
        yield from layer_parts(architecture, layer, origin=layer, plain=layer, only="mlp.")
        yield norm_part(architecture, layer)

    @classmethod
    def frozen(cls, architecture: Architecture, layer: int) -> Mapping[str, Source]:
        """The layer's own norms before and after its MLP."""
        norms = {"input_norm.weight": "mlp_norm.weight", "output_norm.weight": "mlp_post_norm.weight"}
        held, prefix = parameter_parts(architecture), f"model.layers.{layer - 1}"
        return {name: layer_source(architecture, origin, prefix) for name, origin in norms.items() if origin in held}

    @classmethod
    def flops(cls, architecture: Architecture, tokens: int) -> int:
        """``14 T h f``: forward and weight gradients ``6 T h f`` each, and the down projection's input gradient.

        What gate and up read is frozen.
        """
        return 14 * tokens * architecture.hidden_size * architecture.ffn_size

    @classmethod
    def graph_bytes(cls, sizes: LayerBytes) -> GraphBytes:
        """The MLP's and the norm's."""
        features, mlp = norm_graph_bytes(sizes), mlp_graph_bytes(sizes)
        return GraphBytes(features.kept + mlp.kept, features.backward + mlp.backward)

    def rest(self, x: Tensor) -> Tensor:
        """See ``Body``."""
        return self.norm(add_mlp(x, self.input_norm, self.mlp, self.output_norm, self.multiplier))


def mlp_graph_bytes(sizes: LayerBytes) -> GraphBytes:
    """Of a gated MLP and the norm before it.

    Kept for backward are the input of the norm and of each linear, gate and up together, and the activated gate.
    Backward holds two gradients of their size at a time beside these, or a weight's gradient.
    """
    inputs, ffn, matrix = sizes.hidden + sizes.gathered, sizes.ffn, sizes.matrix
    return GraphBytes(inputs + 4 * ffn, inputs + max(6 * ffn, 5 * ffn + matrix, 2 * ffn + 2 * matrix))


BODY = MLPBody
