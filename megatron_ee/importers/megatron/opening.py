"""Common steps of opening a Megatron directory of either format: trust, iteration, and the model's configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.hf_directory import released_assets
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.untrusted import read_json
from megatron_ee.errors import CheckpointError, DamagedError, shown, storage_errors
from megatron_ee.families.registry import parse_architecture
from megatron_ee.importers.megatron.settings import check_family

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class ImportedModel:
    """The model of imported weights.

    Attributes:
        architecture: its shape.
        assets: its small files, including ``config.json``.
        where: the file that describes it.
        notes: notices for the user.
    """

    architecture: Architecture
    assets: Mapping[str, Path | bytes]
    where: str
    notes: tuple[str, ...] = ()


def require_trust(path: Path, trust: bool) -> None:
    """Refuse a directory of pickles unless the user trusts it.

    Raises:
        CheckpointError: ``trust`` is false.
    """
    if not trust:
        raise CheckpointError(
            f"{path}: Megatron's checkpoints are pickles, which can run code when they are read; megatron-ee runs "
            "none of it, but read only those of people you trust: confirm with --trust-checkpoint"
        )


def tracked_iteration(path: Path) -> Path | None:
    """The latest iteration's directory in ``path``, from its tracker file; None without a tracker file.

    Raises:
        CheckpointError: the tracker file is invalid.
    """
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    with storage_errors(tracker, "read"), tracker.open("rb") as file:
        text = file.read(64).strip()
    if text == b"release":
        return path / "release"
    if not re.fullmatch(rb"\d{1,18}", text):
        raise CheckpointError(f"{tracker}: {shown(text)} is not an iteration")
    return path / f"iter_{int(text):07}"


def given_model(config: Path) -> ImportedModel:
    """Read the model configuration that the user gives with --config.

    Args:
        config: a Hugging Face directory, whose small files are copied, or only its ``config.json``.

    Raises:
        CheckpointError: it cannot be read, or is not supported.
    """
    path = config / "config.json" if config.is_dir() else config
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: expected a JSON object")
    architecture = parse_architecture(content, str(path))
    check_family(architecture, str(path))
    return ImportedModel(architecture, released_assets(config) if config.is_dir() else {"config.json": path}, str(path))


def derived_model(content: dict[str, Any], where: str) -> ImportedModel:
    """Build the model from a ``config.json`` that was derived from the checkpoint's settings in ``where``.

    Raises:
        CheckpointError: it is not supported.
    """
    text = json.dumps(content, indent=2).encode() + b"\n"
    return ImportedModel(parse_architecture(content, where), {"config.json": text}, where)
