"""Body ``norm``: N(h_k), a copy of the final norm; the first k layers as a model of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_ee.config.architecture import Architecture
from megatron_ee.exits.body import Body, ExitPart, GraphBytes, LayerBytes, norm_part
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
    def graph_bytes(cls, sizes: LayerBytes) -> GraphBytes:
        """The norm's."""
        return norm_graph_bytes(sizes)

    def rest(self, x: Tensor) -> Tensor:
        """See ``Body``."""
        return self.norm(x)


def norm_graph_bytes(sizes: LayerBytes) -> GraphBytes:
    """Of the norm before the head: what it reads, and what it gives to the head."""
    features = sizes.hidden + sizes.whole
    return GraphBytes(features, features)


BODY = NormBody
