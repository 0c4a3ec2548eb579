"""What a checkpoint holds, whatever its format: the common ground that every conversion goes over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec


@dataclass(frozen=True)
class Contents:
    """A backbone, exits, or both; nothing of the tensors is in memory.

    Attributes:
        source: where it was read from.
        format: what was found there, in words for a person: ``Hugging Face model``, ``adapter`` and so on.
        architecture: the backbone's shape; None where there is only an adapter.
        backbone: every weight of the backbone under its released (Hugging Face) name, in its released shape: no
            padding, nothing fused. Empty where there is only an adapter.
        non_weights: tensors of the released files that hold no weight of their own and are carried along.
        exits: in the order of their layers.
        exit_tensors: what the exits hold of their own, as an adapter names it: ``exits.<layer>.<released name>``; see
            ``names.exit_tensors``.
        assets: small files that belong to the model (``config.json``, tokenizer, licence) by name, as they are: a
            path to copy, or the content.
        base_model: where the exits' backbone is.
        backbone_sha256: the hash of the backbone that the exits were made for; None where there are none, or where
            the exits come with their backbone in a format that does not state it.
        settings: ``output_settings`` of that backbone's architecture; None where they are not known.
        steps: tuning steps behind the exits.
        notes: lines for a person, on what was changed or given up.
    """

    source: Path
    format: str
    architecture: Architecture | None
    backbone: Mapping[str, StoredTensor] = field(default_factory=dict)
    non_weights: Mapping[str, StoredTensor] = field(default_factory=dict)
    exits: tuple[ExitSpec, ...] = ()
    exit_tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    assets: Mapping[str, Path | bytes] = field(default_factory=dict)
    base_model: str = ""
    backbone_sha256: str | None = None
    settings: Mapping[str, Any] | None = None
    steps: int = 0
    notes: tuple[str, ...] = ()
