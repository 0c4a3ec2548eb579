"""Body ``mlp``: N(r_k + MLP(n(r_k))), where n is layer k's own pre-MLP norm, frozen.

The MLP, with the norm after it in families that have one, starts as a copy of layer k's MLP, and replaces it: the exit
is the first k layers with another last MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_ee.config.architecture import Architecture
from megatron_ee.exits.body import Body, ExitPart, GraphBytes, LayerBytes, layer_parts, norm_part
from megatron_ee.exits.fit import ProjectionFit
from megatron_ee.exits.norm import norm_graph_bytes
from megatron_ee.families.family import Source
from megatron_ee.families.weights import layer_source, parameter_parts
from megatron_ee.model.layer import MLP, add_mlp, build_norms
from megatron_ee.model.linear import RMSNorm
from megatron_ee.model.traversal import Tap
from megatron_ee.parallel.costs import mlp_flops

if TYPE_CHECKING:
    from megatron_ee.model.setup import ModelSetup

PRE_NORM, POST_NORM = "mlp_norm.weight", "mlp_post_norm.weight"


class MLPBody(Body):
    """``N(r_k + MLP(n(r_k)))``."""

    saved = frozenset({"mlp", "norm"}) | frozenset({"post_feedforward_layernorm"})  # of some families

    def __init__(self, setup: ModelSetup, layer: int) -> None:
        super().__init__(setup, layer)
        self.multiplier = setup.architecture.residual_multiplier
        self.mlp_norm, self.mlp_post_norm = build_norms(setup)
        if self.mlp_norm is not None:
            self.mlp_norm.requires_grad_(False)
        self.mlp = MLP(setup)
        self.norm = RMSNorm(setup, setup.architecture.hidden_size)

    @classmethod
    def taps(cls, layer: int) -> Mapping[int, Tap]:
        """r_k."""
        return {layer: "residual"}

    @classmethod
    def parts(cls, architecture: Architecture, layer: int) -> Iterator[ExitPart]:
        """The MLP, the norm after it in families that have one, and the norm before the head."""
        for part in layer_parts(architecture, layer, origin=layer, plain=layer, only=("mlp.", POST_NORM)):
            yield dataclasses.replace(part, optional=part.parameter == POST_NORM)
        yield norm_part(architecture, layer)

    @classmethod
    def frozen(cls, architecture: Architecture, layer: int) -> Mapping[str, Source]:
        """The layer's own norm before its MLP."""
        if PRE_NORM not in parameter_parts(architecture):
            return {}
        return {PRE_NORM: layer_source(architecture, PRE_NORM, f"model.layers.{layer - 1}")}

    @classmethod
    def fitted_rows(cls, architecture: Architecture) -> int:
        """Of the down projection."""
        return architecture.ffn_size + architecture.mlp_bias

    @classmethod
    def forward_flops(cls, architecture: Architecture, tokens: int) -> int:
        """Of the MLP."""
        return mlp_flops(architecture, tokens)

    @classmethod
    def flops(cls, architecture: Architecture, tokens: int) -> int:
        """``14 T h f``: forward and weight gradients ``6 T h f`` each, and the down projection's input gradient.

        What gate and up read is frozen.
        """
        return 14 * tokens * architecture.hidden_size * architecture.ffn_size

    @classmethod
    def ring_passes(cls, sequence_parallel: bool) -> int:
        """The projection's output is all-reduced. With sequence parallelism the tap is gathered, the output is
        scattered, and its gradient is gathered."""
        return 3 if sequence_parallel else 2

    @classmethod
    def graph_bytes(cls, sizes: LayerBytes) -> GraphBytes:
        """The MLP's and the norm's.

        Without a norm before it, the MLP reads the tap, which is counted elsewhere. A norm after it keeps its input
        until the MLP's backward.
        """
        features, mlp = norm_graph_bytes(sizes), mlp_graph_bytes(sizes)
        backward = features.backward + mlp.backward - (0 if sizes.norms_before else sizes.hidden)
        return GraphBytes(features.kept + mlp.kept, backward)

    def rest(self, x: Tensor) -> Tensor:
        """See ``Body``."""
        return self.norm(add_mlp(x, self.mlp_norm, self.mlp, self.mlp_post_norm, self.multiplier))

    def fit(self, setup: ModelSetup) -> ProjectionFit:
        """Of the down projection."""
        return ProjectionFit(setup, self.mlp, self.mlp_norm, self.mlp_post_norm, self.multiplier)


def mlp_graph_bytes(sizes: LayerBytes) -> GraphBytes:
    """Of a gated MLP and its norms.

    Kept for backward are the inputs of the norms and linears, gate and up together, and the activated gate. Backward
    holds two gradients of their size at a time beside these, or a weight's gradient.
    """
    inputs, ffn, matrix = sizes.hidden + sizes.gathered, sizes.ffn, sizes.matrix
    backward = max(6 * ffn, 5 * ffn + matrix, 2 * ffn + 2 * matrix)
    return GraphBytes(inputs + sizes.post_normed + 4 * ffn, inputs + backward)


BODY = MLPBody
