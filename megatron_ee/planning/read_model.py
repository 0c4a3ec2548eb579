"""Reads what a plan needs of a model: its ``config.json``, without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.schema import Quantise, RunConfig
from megatron_ee.errors import ConfigError
from megatron_ee.families.multimodal import plain_config
from megatron_ee.families.quantisation import GROUPS, fits_groups
from megatron_ee.families.registry import parse_architecture, read_config, read_config_file
from megatron_ee.planning.parameters import input_features

ASSUMED = "bfloat16"
DTYPES = {"float32": "float32", "float64": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
"""What a model is run in with ``dtype: auto``, by the dtype in its configuration."""


def read_model(
    config: RunConfig, instead: Path | None = None, check: Callable[[dict[str, Any], str], object] | None = None
) -> tuple[RunConfig, Architecture, list[str]]:
    """The configuration with its model's directory and dtype resolved, the architecture, and notices for the user.

    ``model.path`` is a directory with a ``config.json``, or such a file.

    Args:
        config: of the run.
        instead: a ``config.json`` that is read if ``model.path`` does not exist.
        check: called with the configuration of the text model and the file's name, to refuse it.

    Raises:
        ConfigError: neither exists, or the model cannot be quantised as ``model.quantise`` says.
        CheckpointError: the file cannot be used.
    """
    path, notices = Path(config.model.path), []
    if not config.model.path or not path.exists():
        line = f"model.path: no such file or directory: {config.model.path}"
        if instead is None or not instead.is_file():
            raise ConfigError(f"{line}; a plan needs the model's config.json, no weights")
        notices.append(f"{line}; planned with {instead}")
        path = instead
    values = read_config_file(path) if path.is_file() else read_config(path)
    where = str(path if path.is_file() else path / "config.json")
    architecture = parse_architecture(values, where, quantised=True)
    if check is not None:
        check(plain_config(values, where), where)
    _check_quantise(config.model.quantise, architecture, where)
    dtype = config.model.dtype
    if dtype == "auto":
        dtype, known = _dtype(values)
        if not known:
            notices.append(f"model.dtype: {path} names no dtype; planned for {ASSUMED}")
    model = dataclasses.replace(config.model, path=str(path.parent if path.is_file() else path), dtype=dtype)
    return dataclasses.replace(config, model=model), architecture, notices


def _check_quantise(kind: Quantise, architecture: Architecture, where: str) -> None:
    """Refuse what ``tune`` refuses when it loads the layers."""
    if kind != "none" and architecture.packed_bits:
        raise ConfigError(f"model.quantise: {where} is of a model that is quantised already; leave it out")
    for features in input_features(architecture) if kind == "int4" else ():
        if not fits_groups(features):
            raise ConfigError(
                f"model.quantise: int4 needs groups of {', '.join(map(str, GROUPS))} input features, but none divides "
                f"{features}, which matrices of the layers have; use int8"
            )


def _dtype(values: dict[str, Any]) -> tuple[Any, bool]:
    """The dtype that a configuration names, also in that of a text model, and whether it does."""
    text = values.get("text_config")
    for block in (values, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if block.get(key) in DTYPES:
                return DTYPES[block[key]], True
    return ASSUMED, False
