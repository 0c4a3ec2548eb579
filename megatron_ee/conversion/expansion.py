"""Expands the quantised weights of a checkpoint: what is written is a plain model with their values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.config.untrusted import parse_json, read_json
from megatron_ee.families.quantisation import QUANTISED
from megatron_ee.families.weights import is_non_weight

CONFIG = "config.json"


def expanded(contents: Contents) -> Contents:
    """The same model without quantisation, in the dtype of ``config.json``. Other contents are not changed.

    The exits fit the new backbone, whose values are the same. Its hash is left open.
    """
    arch = contents.architecture
    if arch is None or not contents.quantised:
        return contents
    source = contents.assets[CONFIG]
    config = read_json(source) if isinstance(source, Path) else parse_json(source, f"{contents.source}: {CONFIG}")
    for part in (config, config.get("text_config") or {}):
        for key in QUANTISED:
            part.pop(key, None)
    text = json.dumps(config, indent=2) + "\n"
    kept = {name: tensor for name, tensor in contents.non_weights.items() if is_non_weight(name, arch)}
    return replace(
        contents,
        architecture=replace(arch, weight_format="", packed_bits=0.0),
        non_weights=kept,
        assets={**contents.assets, CONFIG: text.encode("utf-8")},
        quantised={},
        backbone_sha256=None,
        settings=None,
        notes=(*contents.notes, f"{contents.source}: its {len(contents.quantised)} quantised weights are expanded"),
    )
