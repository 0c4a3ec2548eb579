"""Writes an adapter, which holds only the exits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_ee.checkpoint.adapter import DESCRIPTION, WEIGHTS, describe_corpora, describe_exits
from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.outputs import OutputDirectory, OutputFile, Written, whole_part
from megatron_ee.errors import CheckpointError


def to_adapter(contents: Contents) -> OutputDirectory:
    """Plan the output: the exits of ``contents``, with the backbone that they record.

    Raises:
        CheckpointError: there are no exits.
    """
    if not contents.exits:
        raise CheckpointError(f"{contents.source}: holds no exits; add some with --exits or --adapter")

    def finish(directory: Path, written: Mapping[str, Written]) -> dict[str, bytes]:
        return describe(contents, directory)

    return OutputDirectory("adapter", (adapter_file(contents),), {}, finish)


def adapter_file(contents: Contents, prefix: str = "") -> OutputFile:
    """The weights of an adapter whose directory is ``prefix`` in the output."""
    # In a fixed order for all source formats, so that equal exits give equal files.
    return OutputFile(prefix + WEIGHTS, tuple(whole_part(*pair) for pair in sorted(contents.exit_tensors.items())))


def describe(contents: Contents, directory: Path, prefix: str = "") -> dict[str, bytes]:
    """The description of the adapter whose weights are in ``directory``, by its name in the output."""
    content = describe_exits(
        contents.exits,
        contents.base_model,
        contents.backbone_sha256,
        contents.steps,
        file_sha256(directory / WEIGHTS),
        contents.settings,
        describe_corpora(contents.corpora),
    )
    return {prefix + DESCRIPTION: json.dumps(content, indent=2).encode() + b"\n"}
