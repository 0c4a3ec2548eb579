"""The part of the model that one process holds: a run of layers, and the exits hosted with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.registry import tap_of
from megatron_ee.model.backbone import Backbone, VocabHead
from megatron_ee.model.exit_loss import exit_statistics
from megatron_ee.model.linear import product
from megatron_ee.model.metrics import TokenStats
from megatron_ee.model.traversal import run_layers, run_segment, run_segments
from megatron_ee.parallel.layout import Layout

if TYPE_CHECKING:
    from megatron_ee.model.attention import Positions
    from megatron_ee.model.setup import ModelSetup


class Stage(nn.Module):
    """Layers and exits of one pipeline rank.

    Attributes:
        layers: run of numbers of the layers that it runs.
        backbone: frozen.
        shared_head: the backbone's head, frozen, where an exit with a ``shared`` or ``low_rank`` head is hosted.
        exits: by layer number, in order.
        taps: by layer, what exits read of the layers here.
    """

    def __init__(
        self,
        setup: ModelSetup,
        layers: Sequence[int],
        exits: Sequence[ExitSpec],
        *,
        embedding: bool = True,
        final_exit: bool = False,
        tapped: Sequence[ExitSpec] | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        """Allocate the stage on this process's device, without values; ``checkpoint.loading`` fills it.

        Args:
            setup: architecture and groups.
            layers: run of layer numbers; may be empty.
            exits: hosted here.
            embedding: whether the stage starts from tokens.
            final_exit: whether it holds the final norm and the LM head.
            tapped: all exits that read layers of this stage, wherever they are hosted; by default ``exits``.
            backbone: of another stage with these layers, and perhaps more, which is then shared; None to allocate one.
        """
        super().__init__()
        self.setup, self.layers = setup, tuple(layers)
        self.taps = {spec.layer: tap_of(spec) for spec in (exits if tapped is None else tapped)}
        with torch.device(platform.device()):
            if backbone is None:
                backbone = Backbone(setup, layers, embedding=embedding, final_exit=final_exit)
            self.backbone = backbone
            self.shared_head = self._shared_head(exits)
            self._exits = nn.ModuleDict({str(spec.layer): Exit(setup, spec, self.shared_head) for spec in exits})

    def _shared_head(self, exits: Sequence[ExitSpec]) -> VocabHead | None:
        if all(spec.head == "own" for spec in exits):
            return None
        if self.backbone.head is not None:
            return self.backbone.head
        head = VocabHead(self.setup).requires_grad_(False)
        if self.setup.architecture.tied and self.backbone.embedding is not None:
            head.weight = self.backbone.embedding.weight
        return head

    @property
    def exits(self) -> list[Exit]:
        """The exits hosted here, in the order of their layers."""
        return list(self._exits.values())  # type: ignore[arg-type]

    @torch.no_grad()
    def run_layers(self, h: Tensor, positions: Positions, *, to_end: bool = False) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the frozen layers, keeping only what exits read.

        Args:
            h: ``[seq, batch, hidden]``, of the embedding or the previous stage.
            positions: of the microbatch.
            to_end: the last layer's h is wanted too; otherwise its MLP is left out where only an ``mlp`` exit, which
                has its own, follows.

        Returns:
            The last h computed, and by layer the tap of each exit that reads these, all ``[seq, batch, hidden]``.
        """
        kept: dict[int, Tensor] = {}

        def keep(layer: int, tap: Tensor) -> Tensor:
            kept[layer] = tap
            return tap

        def run(start: int, stop: int, x: Tensor) -> Tensor:
            return run_segment(self.backbone.layers_between, self.taps, start, stop, x, positions)

        if self.layers:
            h = run_layers(run, self.taps, self.layers[0] - 1, self.layers[-1], h, keep, to_hidden=to_end)
        return h, kept

    def run_by_layer(
        self,
        hidden: list[Tensor],
        positions: Sequence[Positions],
        at_tap: Callable[[int, list[Tensor]], None],
        *,
        to_end: bool = False,
    ) -> list[Tensor]:
        """Run the frozen layers, one after the other, each for all microbatches.

        Args:
            hidden: h of each microbatch, ``[seq, batch, hidden]``; the list is used up.
            positions: of each microbatch.
            at_tap: called with the layer of an exit, and each microbatch's tap, as soon as they are computed.
            to_end: as in ``run_layers``.

        Returns:
            The last h computed of each microbatch.
        """

        def run(start: int, stop: int, xs: list[Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return run_segments(self.backbone.layers_between, self.taps, start, stop, xs, positions)

        def tapped(layer: int, taps: list[Tensor]) -> list[Tensor]:
            at_tap(layer, taps)
            return taps

        return run_layers(run, self.taps, self.layers[0] - 1, self.layers[-1], hidden, tapped, to_hidden=to_end)

    @torch.no_grad()
    def final_statistics(self, h: Tensor, labels: Tensor, *, chunk_tokens: int = 512) -> TokenStats:
        """Statistics of the final exit from h after the last layer; arguments as for ``Exit.statistics``."""
        assert self.backbone.final_norm is not None and self.backbone.head is not None, "no final exit here"
        z = self.final_features(h).flatten(0, 1)
        group, tiles = self.setup.groups.tensor, self.setup.tiles
        return exit_statistics(z, self.backbone.head, labels, group, chunk_tokens=chunk_tokens, tiles=tiles)

    def final_features(self, h: Tensor) -> Tensor:
        """h after the last layer -> what the final exit's head reads, ``[seq, batch, hidden]``."""
        assert self.backbone.final_norm is not None, "no final exit here"
        return self.setup.head_input(self.backbone.final_norm(h))

    def final_logits(self, z: Tensor) -> Tensor:
        """``[..., hidden]`` -> float32 logits of the final exit ``[..., vocab]``, the same on every rank."""
        head = self.backbone.head
        assert head is not None, "no final exit here"
        return head.capped(self.setup.gather_vocabulary(product(z, head.weight)).float())


def build_stage(
    setup: ModelSetup,
    layout: Layout,
    specs: Sequence[ExitSpec],
    *,
    final_exit: bool = False,
    backbone: Backbone | None = None,
) -> Stage:
    """This rank's stage of a layout, allocated.

    Args:
        setup: architecture and groups.
        layout: of all stages.
        specs: the exits of all stages.
        final_exit: whether the stage of the last layer holds the final exit too.
        backbone: see ``Stage``.
    """
    index = setup.groups.pipeline.rank()
    place = layout.stages[index]
    return Stage(
        setup,
        place.layers,
        [spec for spec in specs if spec.layer in place.exits],
        embedding=1 in place.layers,
        final_exit=final_exit and index == layout.last_layered,
        tapped=[spec for spec in specs if spec.layer in place.layers],
        backbone=backbone,
    )


@contextlib.contextmanager
def whole_sequences(stage: Stage) -> Iterator[None]:
    """Run ``stage`` without sequence parallelism while the context is open, for passes of single tokens.

    Weights are cut in the same way with and without it.
    """
    names = ("sequence_parallel", "reduce_scatter_embeddings")  # megatron-core's, in its configuration and its layers
    owners = (stage.setup.config, *stage.modules())
    on = [(owner, name) for owner in owners for name in names if getattr(owner, name, False)]
    for owner, name in on:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in on:
            setattr(owner, name, True)
