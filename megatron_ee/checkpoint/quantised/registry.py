"""The methods of quantisation that are read. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ee.checkpoint.quantised.awq import AWQ
from megatron_ee.checkpoint.quantised.compressed_tensors import COMPRESSED_TENSORS
from megatron_ee.checkpoint.quantised.formats import Format, Method
from megatron_ee.checkpoint.quantised.fp8_blocks import FP8
from megatron_ee.checkpoint.quantised.gptq import GPTQ
from megatron_ee.errors import CheckpointError, shown
from megatron_ee.families.quantisation import QUANTISED

METHODS: dict[str, Method] = {method.name: method for method in (AWQ, COMPRESSED_TENSORS, FP8, GPTQ)}
"""By ``quant_method``."""
MARKS = frozenset(mark for method in METHODS.values() for mark in method.marks)
"""Ends of tensors' names that only quantised weights have."""


@dataclass(frozen=True)
class Quantisation:
    """How a release is quantised.

    Attributes:
        method: its method.
        formats: that its weights may have; none if only other things are quantised.
        activations: whether it is made to quantise activations or the KV cache too.
    """

    method: Method
    formats: tuple[Format, ...]
    activations: bool = False


def find_quantisation(config: Mapping[str, Any], where: str) -> Quantisation | None:
    """Read how a model is quantised from its parsed ``config.json``; None if it is not.

    Args:
        config: of a text model; see ``families.multimodal.plain_config``.
        where: name of the file, for messages.

    Raises:
        CheckpointError: the method, or one of its settings, is not supported.
    """
    settings = next((config[key] for key in QUANTISED if config.get(key)), None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: quantization_config must be an object, not {shown(settings)}")
    name = settings.get("quant_method", "compressed-tensors" if "config_groups" in settings else None)
    if not isinstance(name, str) or name not in METHODS:
        raise CheckpointError(
            f"{where}: quantization_config.quant_method {shown(name)} is not supported; supported: {', '.join(METHODS)}"
        )
    method = METHODS[name]
    return Quantisation(method, method.formats(settings, where), method.activations(settings))
