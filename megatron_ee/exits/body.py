"""The interface of an exit body. All code outside ``exits`` uses this interface, never the name of a body."""

from __future__ import annotations

import math
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
    from megatron_ee.exits.fit import Fit
    from megatron_ee.model.attention import LayerCache, Positions
    from megatron_ee.model.setup import ModelSetup


@dataclass(frozen=True)
class ExitPart:
    """A trained parameter of an exit, and its tensors in an adapter.

    Attributes:
        parameter: its name in the body, or with ``head.`` before it in the exit.
        saved: its tensors' names in an adapter, ``exits.<layer>...``, and how tensor parallelism cuts it.
        shapes: of these tensors.
        copied: the source of each tensor with ``init: copy``; None for a tensor that is always drawn.
        plain: their names in the exit as a plain, shallower model; empty if they are not separate tensors there.
        optional: whether an adapter may lack the tensors, because earlier versions did not train them. They are then
            the copied ones.
    """

    parameter: str
    saved: Source
    shapes: tuple[tuple[int, ...], ...]
    copied: Source | None
    plain: tuple[str, ...] = ()
    optional: bool = False

    @property
    def elements(self) -> int:
        """Number of elements of the tensors."""
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of a decoder layer's tensors on one rank, for a microbatch or a piece of it.

    Attributes:
        hidden: this rank's share of the hidden states.
        whole: the hidden states of all tokens.
        gathered: additional bytes of gathering them: ``whole`` with sequence parallelism, else 0.
        query: all query heads of this rank.
        key: its key heads, and its value heads.
        ffn: its features of the MLP.
        matrix: weights of one matrix of the MLP, independent of the tokens.
        wide: ``hidden`` in float32, if norms copy it so, else 0.
        scores: scores of one block of queries in float32, if attention has a soft cap, else 0.
        wide_heads: queries and keys in float32, if norms over whole projections copy them so, else 0.
        norms_before: whether there are norms before attention and MLP.
        both_norms: whether there are norms before and after attention and MLP.
    """

    hidden: int
    whole: int
    gathered: int
    query: int
    key: int
    ffn: int
    matrix: int
    wide: int = 0
    scores: int = 0
    wide_heads: int = 0
    norms_before: bool = True
    both_norms: bool = False

    @property
    def normed(self) -> int:
        """What a norm's backward reads: its input, or the float32 copy of it."""
        return self.wide or self.hidden

    @property
    def post_normed(self) -> int:
        """The same of the norm after attention or MLP, if there is one before it too."""
        return self.normed if self.both_norms else 0


@dataclass(frozen=True)
class GraphBytes:
    """Memory of a body's graph on one rank, including the head's input.

    Attributes:
        kept: tensors that the body's backward will read, alive during the loss.
        backward: peak during the body's backward.
    """

    kept: int
    backward: int


class Body(nn.Module):
    """The part of an exit between its taps and its head.

    A subclass is a module with ``attention_half`` and ``rest``. Its class methods describe all exits of this kind
    without building one. The defaults are those of a body without parameters.

    Attributes:
        saved: prefixes of its tensors' names in an adapter, after ``exits.<layer>.``, which distinguish its weights
            from those of other bodies. Empty if it trains nothing.
        extra_layers: decoder layers that it runs besides the k layers below it.
        not_plain: why an exit with this body is not a plain model of ``k + extra_layers`` layers; empty if it is one.
    """

    saved: ClassVar[frozenset[str]] = frozenset()
    extra_layers: ClassVar[int] = 0
    not_plain: ClassVar[str] = ""

    def __init__(self, setup: ModelSetup, layer: int) -> None:
        """Allocate the body of an exit after ``layer``; its frozen parameters require no gradient."""
        super().__init__()

    @classmethod
    def taps(cls, layer: int) -> Mapping[int, Tap]:
        """The taps of an exit after ``layer``, by backbone layer; by default h of this layer."""
        return {layer: "hidden"}

    @classmethod
    def parts(cls, architecture: Architecture, layer: int) -> Iterator[ExitPart]:
        """Its trained parameters, in an exit after ``layer``."""
        return iter(())

    @classmethod
    def frozen(cls, architecture: Architecture, layer: int) -> Mapping[str, Source]:
        """The backbone's norms that it uses, frozen: its parameter's name -> the source of the copy."""
        return {}

    @classmethod
    def windows(cls, architecture: Architecture) -> tuple[int | None, ...]:
        """The attention window of each of its own layers with a KV cache; None for no window.

        A body without such layers works token by token, so a microbatch may be split into pieces of tokens.
        """
        return ()

    @classmethod
    def fitted_rows(cls, architecture: Architecture) -> int | None:
        """Size of the square Gram matrix of a closed-form fit: features of the matrix that is fitted, and its bias.

        0 if only a norm's scale is fitted, None if there is nothing to fit.
        """
        return None

    @classmethod
    def forward_flops(cls, architecture: Architecture, tokens: int) -> int:
        """Forward alone, as in validation, for one sequence of ``tokens``."""
        return 0

    @classmethod
    def flops(cls, architecture: Architecture, tokens: int) -> int:
        """Forward and backward for one sequence of ``tokens``; a tap needs no gradient. As ``parallel.costs``."""
        return 0

    @classmethod
    def ring_passes(cls, sequence_parallel: bool) -> int:
        """Number of times that training it passes a microbatch's hidden states around the tensor-parallel ranks.

        An all-gather or a reduce-scatter is one pass, an all-reduce is two. By default it has no such linears.
        """
        return 0

    @classmethod
    def graph_bytes(cls, sizes: LayerBytes) -> GraphBytes:
        """Memory of its graph; by default the tap is what the head reads."""
        return GraphBytes(sizes.gathered, sizes.gathered)

    def attention_half(self, tap: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """The part that needs all tokens, or a cache of the earlier ones: ``[seq, batch, hidden]`` -> the same."""
        return tap

    def rest(self, x: Tensor) -> Tensor:
        """Result of ``attention_half`` -> input of the head, token by token: ``[seq, batch, hidden]``."""
        return x

    def fit(self, setup: ModelSetup) -> Fit | None:
        """A closed-form fit of its weights, of which there are sums to gather yet; None if there is nothing to fit."""
        return None


def norm_part(architecture: Architecture, layer: int) -> ExitPart:
    """The norm before the head, of the parameter ``norm.weight``: a copy of the final norm."""
    saved, copied = Source((f"exits.{layer}.norm.weight",), "whole"), Source((FINAL_NORM,), "whole")
    return ExitPart("norm.weight", saved, ((architecture.hidden_size,),), copied, copied.names)


def layer_parts(
    architecture: Architecture, layer: int, *, origin: int, plain: int, module: str = "", only: tuple[str, ...] = ("",)
) -> Iterator[ExitPart]:
    """Parts that are copies of a backbone layer's parameters, of all or of those that begin with one of ``only``.

    Args:
        architecture: of the model.
        layer: the layer of the exit.
        origin: number of the source layer.
        plain: number of the layer in the plain model.
        module: the body's submodule, with a dot at the end.
        only: such as ``("mlp.",)``.
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
