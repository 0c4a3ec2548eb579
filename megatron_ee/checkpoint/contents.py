"""The contents of a checkpoint, independent of its format. Every conversion reads and writes this form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.quantised.weights import QuantisedWeight, stored_weights
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.families.multimodal import Spelling


@dataclass(frozen=True)
class Contents:
    """A backbone, exits, or both. No tensor is in memory.

    Attributes:
        source: the directory that it was read from.
        format: the format in words: ``Hugging Face model``, ``adapter`` and so on.
        architecture: the backbone's shape; None for an adapter.
        backbone: every weight of the backbone under its released (Hugging Face) name, in its released shape: not
            padded, not fused. Empty for an adapter. Quantised ones are expanded as they are read.
        non_weights: tensors of the released files that hold no weight of their own. They are copied.
        vision: tensors of a multimodal release outside its text model, by their names in the release.
        spelling: mapping between that release's names and the backbone's; None for a text model.
        exits: in the order of their layers.
        exit_tensors: the exits' own tensors under their names in an adapter, ``exits.<layer>.<released name>``; see
            ``exits.tensors.exit_tensors``.
        assets: small files of the model (``config.json``, tokenizer, licence) by name, unchanged: a path to copy, or
            the content.
        base_model: path of the exits' backbone.
        backbone_sha256: the hash of the exits' backbone; None if there are no exits, or if they come with their
            backbone in a format that does not record it.
        settings: ``SavedModel.settings`` of that backbone; None if they are not known.
        steps: number of tuning steps of the exits.
        corpora: path and fingerprint of each corpus that they were tuned on; None if they are not recorded.
        notes: notices for the user about what was changed or left out.
        quantised: the quantised weights of the backbone, as they are stored, by name.
    """

    source: Path
    format: str
    architecture: Architecture | None
    backbone: Mapping[str, StoredTensor] = field(default_factory=dict)
    non_weights: Mapping[str, StoredTensor] = field(default_factory=dict)
    vision: Mapping[str, StoredTensor] = field(default_factory=dict)
    spelling: Spelling | None = None
    exits: tuple[ExitSpec, ...] = ()
    exit_tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    assets: Mapping[str, Path | bytes] = field(default_factory=dict)
    base_model: str = ""
    backbone_sha256: str | None = None
    settings: Mapping[str, Any] | None = None
    steps: int = 0
    corpora: tuple[tuple[str, str], ...] | None = None
    notes: tuple[str, ...] = ()
    quantised: Mapping[str, QuantisedWeight] = field(default_factory=dict)

    @property
    def stored_backbone(self) -> dict[str, StoredTensor]:
        """The tensors that hold the backbone, by released name: several for a quantised weight."""
        return stored_weights(self.backbone, self.quantised)
