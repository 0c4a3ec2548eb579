"""The registry of supported families, and functions that read a model's architecture."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.untrusted import allowed_root, check_confined, read_json
from megatron_ee.errors import CheckpointError, shown
from megatron_ee.families.family import Family
from megatron_ee.families.gemma2 import GEMMA2
from megatron_ee.families.gemma3 import GEMMA3
from megatron_ee.families.granite import GRANITE
from megatron_ee.families.llama import LLAMA
from megatron_ee.families.ministral3 import MINISTRAL3
from megatron_ee.families.mistral import MISTRAL
from megatron_ee.families.multimodal import RELEASES, plain_config
from megatron_ee.families.olmo2 import OLMO2
from megatron_ee.families.olmo3 import OLMO3
from megatron_ee.families.phi3 import PHI3
from megatron_ee.families.quantisation import QUANTISED, packed_bits
from megatron_ee.families.qwen2 import QWEN2
from megatron_ee.families.qwen3 import QWEN3
from megatron_ee.families.reading import Config
from megatron_ee.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        GEMMA2,
        GEMMA3,
        GRANITE,
        LLAMA,
        MINISTRAL3,
        MISTRAL,
        OLMO2,
        OLMO3,
        PHI3,
        QWEN2,
        QWEN3,
        SMOLLM3,
    )
}
"""By ``model_type``."""
MAX_FILE = 16 * 2**20  # bytes; released files have a few KiB


def read_architecture(directory: str | Path) -> Architecture:
    """Read ``directory/config.json``.

    Raises:
        CheckpointError: no such file, not JSON, a family or setting that is not supported, or a bad value.
    """
    return parse_architecture(read_config(directory), str(Path(directory) / "config.json"), quantised=True)


def read_config(directory: str | Path) -> dict[str, Any]:
    """Read ``directory/config.json`` without checking its values.

    Raises:
        CheckpointError: no such file, or not a JSON object.
    """
    path = Path(directory) / "config.json"
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: not found; give a Hugging Face model directory with a config.json")
    check_confined(path, allowed_root(path.parent))
    return read_config_file(path)


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a ``config.json``, which may have another name, without checking its values.

    Raises:
        CheckpointError: not a JSON object.
    """
    config = read_json(path, MAX_FILE)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return config


def parse_architecture(config: dict[str, Any], where: str = "config.json", *, quantised: bool = False) -> Architecture:
    """Architecture from the parsed ``config.json``; for a multimodal release, of its text model.

    Args:
        config: the parsed file.
        where: name of the file, for messages.
        quantised: accept a model whose weights are quantised.

    Raises:
        CheckpointError: as ``read_architecture``.
    """
    config = plain_config(config, where)
    family = _find_family(config, where)
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict) or not all(_is_known(family, *entry) for entry in auto_map.items()):
        raise CheckpointError(
            f"{where}: auto_map asks for code from the checkpoint, which is never run; if that code computes what "
            f"transformers' own {family.architecture} does, remove auto_map"
        )
    for key in QUANTISED:
        if config.get(key) and not quantised:
            raise CheckpointError(f"{where}: {key} is set, but quantised weights are not supported here")
    return dataclasses.replace(family.parse(Config(config, where)), packed_bits=packed_bits(config))


def _is_known(family: Family, key: str, name: object) -> bool:
    """Whether an entry of ``auto_map`` is the family's, also if a repository stands before it, as in fine-tunes."""
    return isinstance(name, str) and name.rpartition("--")[2] == family.auto_map.get(key)


def _find_family(config: dict[str, Any], where: str) -> Family:
    names, model_type = config.get("architectures") or [], config.get("model_type")
    by_class = {family.architecture: family for family in FAMILIES.values()}
    known = ", ".join(sorted({*by_class, *(release.architecture for release in RELEASES.values())}))
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        family = by_class.get(names[0])
        if family is None:
            raise CheckpointError(f"{where}: architecture {shown(names[0])} is not supported; supported: {known}")
        if model_type not in (None, family.model_type):
            raise CheckpointError(
                f"{where}: model_type {shown(model_type)} contradicts architecture {shown(names[0])}; correct one"
            )
        return family
    if not names and isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise CheckpointError(
        f"{where}: architectures {shown(names)} (model_type {shown(model_type)}) not supported; supported: {known}"
    )
