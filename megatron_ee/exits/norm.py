"""Body ``norm``: N(h_k), a copy of the final norm; the first k layers as a model of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_ee.config.architecture import Architecture
from megatron_ee.exits.body import Body, ExitPart, GraphBytes, LayerBytes, norm_part
from megatron_ee.exits.fit import ScaleFit, normalised
from megatron_ee.model.linear import RMSNorm

if TYPE_CHECKING:
    from megatron_ee.model.setup import ModelSetup


class NormBody(Body):
    """``N(h_k)``."""

    saved = frozenset({"norm"})

    def __init__(self, setup: ModelSetup, layer: int) -> None:
        super().__init__(setup, layer)
        self.norm = RMSNorm(setup, setup.architecture.hidden_size)

    @classmethod
    def parts(cls, architecture: Architecture, layer: int) -> Iterator[ExitPart]:
        """The norm."""
        yield norm_part(architecture, layer)

    @classmethod
    def fitted_rows(cls, architecture: Architecture) -> int:
        """None: the scale is fitted feature by feature."""
        return 0

    @classmethod
    def graph_bytes(cls, sizes: LayerBytes) -> GraphBytes:
        """The norm's."""
        return norm_graph_bytes(sizes)

    def rest(self, x: Tensor) -> Tensor:
        """See ``Body``."""
        return self.norm(x)

    def fit(self, setup: ModelSetup) -> ScaleFit:
        """Of the norm's scale: ``N(h_k)`` should equal the final exit's features.

        Its copied weight is the final norm's, which the target includes.
        """
        weight, eps = self.norm.scale(), self.norm.eps

        def pair(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            return normalised(h, eps), weight * target

        return ScaleFit(setup, self.norm, pair)


def norm_graph_bytes(sizes: LayerBytes) -> GraphBytes:
    """Of the norm before the head: what it reads, and what it gives to the head; then their gradients."""
    return GraphBytes(sizes.normed + sizes.whole, sizes.hidden + sizes.whole)


BODY = NormBody
