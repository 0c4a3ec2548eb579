"""All layers of the backbone, loaded before tuning for what validation needs of the final exit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import SavedModel
from megatron_ee.exits.stage import Stage, build_stage
from megatron_ee.model.setup import ModelSetup
from megatron_ee.parallel.layout import Layout
from megatron_ee.tuning.interrupt import Interrupt


@dataclass(frozen=True)
class FullModel:
    """The backbone with its final exit. It is loaded at the first use, and freed with this object.

    Attributes:
        setup: without sequence parallelism, since passes of generation may have a single token.
        model: the files.
        layout: all layers, spread over the stages.
        interrupt: checked while the files are read.
    """

    setup: ModelSetup
    model: SavedModel
    layout: Layout
    interrupt: Interrupt

    @cached_property
    def stage(self) -> Stage:
        """This rank's layers. All ranks ask for it together.

        Raises:
            CheckpointError: the model's files cannot be read.
            Interrupted: one of the ranks received a signal; raised on all ranks.
        """
        stage = build_stage(self.setup, self.layout, (), final_exit=True)
        self.setup.groups.together(lambda: load_backbone(stage, self.model, lambda count: self.interrupt.check()))
        return stage
