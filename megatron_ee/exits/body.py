"""What an exit body declares about itself. Everything outside ``exits`` asks these questions, never for a name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import Source
from megatron_ee.families.registry import FAMILIES
from megatron_ee.families.weights import FINAL_NORM, layer_source, layer_tensors
from megatron_ee.model.traversal import Tap

if TYPE_CHECKING:
    from megatron_ee.model.attention import LayerCache, Positions
    from megatron_ee.model.setup import ModelSetup


@dataclass(frozen=True)
class ExitPart:
    """A trained parameter of an exit, and the tensors that it is saved as in an adapter.

    Attributes:
        parameter: its name in the body, or with ``head.`` before it in the exit.
        saved: its tensors' names in an adapter, ``exits.<layer>...``, and how tensor parallelism cuts it.
        shapes: of these tensors.
        copied: what each is copied from with ``init: copy``; None for what is drawn in any case.
        plain: their names in the exit as a plain, shallower model; empty where they have no place of their own there.
    """

    parameter: str
    saved: Source
    shapes: tuple[tuple[int, ...], ...]
    copied: Source | None
    plain: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that tensors of a microbatch, or of a piece of it, take in a decoder layer on one rank.

    Attributes:
        hidden: this rank's share of the hidden states.
        whole: the hidden states of all tokens.
        gathered: what gathering them adds: ``whole`` with sequence parallelism, else 0.
        query: all query heads of this rank.
        key: its key heads, and its value heads.
        ffn: its features of the MLP.
        matrix: weights of one matrix of the MLP, whatever the tokens.
    """

    hidden: int
    whole: int
    gathered: int
    query: int
    key: int
    ffn: int
    matrix: int


@dataclass(frozen=True)
class GraphBytes:
    """Memory of a body's graph on one rank, what the head reads included.

    Attributes:
        kept: alive during the loss: what the body's backward will read.
        backward: the most that is alive during the body's backward.
    """

    kept: int
    backward: int


class Body(nn.Module):
    """What stands between the taps of an exit after layer k and its head.

    A subclass is a module of ``attention_half`` and ``rest``, and answers for all exits of its kind, before one is
    built, what the class methods ask. The defaults are those of a body without parameters.

    Attributes:
        saved: the first parts of its tensors' names in an adapter, after ``exits.<layer>.``, by which its weights are
            told from those of other bodies. Empty: it trains nothing.
        extra_layers: decoder layers that it runs beside the k below it.
        not_plain: why an exit with it is no plain model of ``k + extra_layers`` layers; empty where it is one.
    """

    saved: ClassVar[frozenset[str]] = frozenset()
    extra_layers: ClassVar[int] = 0
    not_plain: ClassVar[str] = ""

    def __init__(self, setup: ModelSetup, layer: int) -> None:
        """Allocate the body of an exit after ``layer``; its frozen parameters require no gradient."""
        super().__init__()

    @classmethod
    def taps(cls, layer: int) -> Mapping[int, Tap]:
        """What an exit after ``layer`` reads, by backbone layer; by default h of its own."""
        return {layer: "hidden"}

    @classmethod
    def parts(cls, architecture: Architecture, layer: int) -> Iterator[ExitPart]:
        """Its trained parameters, in an exit after ``layer``."""
        return iter(())

    @classmethod
    def frozen(cls, architecture: Architecture, layer: int) -> Mapping[str, Source]:
        """The backbone's norms that it reads through: its parameter's name -> what it is copied from."""
        return {}

    @classmethod
    def windows(cls, architecture: Architecture) -> tuple[int | None, ...]:
        """The attention window of each layer of its own that keeps keys and values; None for no window.

        A body without any works on each token alone, so a microbatch may be cut into pieces of tokens.
        """
        return ()

    @classmethod
    def flops(cls, architecture: Architecture, tokens: int) -> int:
        """Forward and backward for one sequence of ``tokens``; a tap needs no gradient. As ``parallel.costs``."""
        return 0

    @classmethod
    def graph_bytes(cls, sizes: LayerBytes) -> GraphBytes:
        """Memory of its graph; by default the tap is what the head reads."""
        return GraphBytes(sizes.gathered, sizes.gathered)

    def attention_half(self, tap: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """The part that needs all tokens, or a cache of the earlier ones: ``[seq, batch, hidden]`` -> the same."""
        return tap

    def rest(self, x: Tensor) -> Tensor:
        """What ``attention_half`` gave -> what the head reads, token by token: ``[seq, batch, hidden]``."""
        return x


def norm_part(architecture: Architecture, layer: int) -> ExitPart:
    """The norm before the head, of the parameter ``norm.weight``: a copy of the final norm."""
    saved, copied = Source((f"exits.{layer}.norm.weight",), "whole"), Source((FINAL_NORM,), "whole")
    return ExitPart("norm.weight", saved, ((architecture.hidden_size,),), copied, copied.names)


def layer_parts(
    architecture: Architecture, layer: int, *, origin: int, plain: int, module: str = "", only: str = ""
) -> Iterator[ExitPart]:
    """Parts that are copies of a backbone layer's parameters, of all or of those that begin with ``only``.

    Args:
        architecture: of the model.
        layer: where the exit stands.
        origin: number of the layer that they are copied from.
        plain: number of the layer that they are in the plain model.
        module: where the body has them, with a dot after it.
        only: such as ``mlp.``.
    """
    shapes = layer_tensors(architecture)
    for name, source in FAMILIES[architecture.family].layer.items():
        if name.startswith(only) and source.names[0] in shapes:
            yield ExitPart(
                module + name,
                layer_source(architecture, name, f"exits.{layer}"),
                tuple(shapes[each] for each in source.names),
                layer_source(architecture, name, f"model.layers.{origin - 1}"),
                layer_source(architecture, name, f"model.layers.{plain - 1}").names,
            )
