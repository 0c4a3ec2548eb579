"""All layers of the backbone, loaded where tuning itself needs only those up to the deepest exit.

Before tuning they give validation what it needs of the final exit, and exits their fitted values. After tuning they
give the labels of gates, and the output of free-running threshold mode.
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
    """The backbone with its final exit. It is loaded at the first use, and again at the first use after ``free``.

    Attributes:
        setup: of the run.
        model: the files.
        interrupt: checked while the files are read.
        tuned: the layout of tuning, if it is known.
    """

    setup: ModelSetup
    model: SavedModel
    interrupt: Interrupt
    tuned: Layout | None = None

    @cached_property
    def layout(self) -> Layout:
        """All layers, without exits: those of ``tuned`` if an engine can run on them, else spread evenly."""
        depth, stages = self.setup.architecture.num_layers, self.setup.groups.pipeline.size()
        return even_layout(depth, stages) if self.tuned is None else self.tuned.of_all(depth)

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

    def with_exits(self, specs: Sequence[ExitSpec], layout: Layout | None = None) -> tuple[Stage, Layout]:
        """A stage of the same layers with exits, whose values are undefined, and the layout of all stages.

        Errors as for ``stage``.

        Args:
            specs: the exits of all stages.
            layout: of which this object ``holds`` the layers; by default all, with each exit on the stage of its layer.
        """
        setup, layers = self.setup, [spec.layer for spec in specs]
        layout = layout or self.layout.with_exits(layers)
        stage = build_stage(setup, layout, specs, backbone=self.stage.backbone)
        setup.groups.together(lambda: fill(shared_head_sources(stage), self.model, setup))
        return stage, layout

    def holds(self, layout: Layout) -> bool:
        """Whether every stage of ``layout`` holds the layers that it has here."""
        return [stage.layers for stage in layout.whole.stages] == [stage.layers for stage in self.layout.stages]

    def free(self) -> None:
        """Free the layers, unless a stage that was made of them is still in use."""
        vars(self).pop("stage", None)


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
