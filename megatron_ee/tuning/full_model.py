"""All layers of the backbone, loaded where tuning itself needs only those up to the deepest exit.

Before tuning they give validation what it needs of the final exit, and exits their fitted values. After tuning they
give the labels of gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_ee.checkpoint.loading import backbone_bytes, fill, load_backbone
from megatron_ee.checkpoint.saved_model import SavedModel
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage, build_stage
from megatron_ee.exits.tensors import shared_head_sources
from megatron_ee.model.setup import ModelSetup
from megatron_ee.parallel.layout import Layout, even_layout
from megatron_ee.progress import track
from megatron_ee.tuning.interrupt import Interrupt


@dataclass(frozen=True)
class FullModel:
    """The backbone with its final exit. It is loaded at the first use, and freed with this object.

    Attributes:
        setup: of the run.
        model: the files.
        interrupt: checked while the files are read.
    """

    setup: ModelSetup
    model: SavedModel
    interrupt: Interrupt

    @cached_property
    def layout(self) -> Layout:
        """All layers, spread evenly over the stages."""
        return even_layout(self.setup.architecture.num_layers, self.setup.groups.pipeline.size())

    @cached_property
    def stage(self) -> Stage:
        """This rank's layers. All ranks ask for it together.

        Raises:
            CheckpointError: the model's files cannot be read.
            Interrupted: one of the ranks received a signal; raised on all ranks.
        """
        stage = build_stage(self.setup, self.layout, (), final_exit=True)
        load_layers(stage, self.model, self.interrupt)
        return stage

    def with_exits(self, specs: Sequence[ExitSpec]) -> tuple[Stage, Layout]:
        """A stage of the same layers with exits, whose values are undefined, and the layout of all stages.

        Errors as for ``stage``.
        """
        setup, layers = self.setup, [spec.layer for spec in specs]
        layout = even_layout(setup.architecture.num_layers, setup.groups.pipeline.size(), layers)
        stage = build_stage(setup, layout, specs, final_exit=True, backbone=self.stage.backbone)
        setup.groups.together(lambda: fill(shared_head_sources(stage), self.model, setup))
        return stage, layout


def load_layers(stage: Stage, model: SavedModel, interrupt: Interrupt) -> None:
    """Load the frozen layers of ``stage``, with a progress bar. Every rank calls this; errors as for ``FullModel``."""
    groups = stage.setup.groups

    def load() -> None:
        with track(backbone_bytes(stage), "B", "loading the frozen layers", enabled=groups.is_main) as bar:

            def advance(count: int) -> None:
                interrupt.check()
                bar.advance(count)

            load_backbone(stage, model, advance)

    groups.together(load)
