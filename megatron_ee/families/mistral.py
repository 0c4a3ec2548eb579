"""Mistral 7B, Nemo, Small: Llama with a window in every layer or in none."""

from __future__ import annotations

from dataclasses import replace

from megatron_ee.config.architecture import Architecture
from megatron_ee.families.family import LLAMA_LAYER, Family
from megatron_ee.families.reading import (
    FULL,
    SLIDING,
    Config,
    plain_architecture,
    read_layer_types,
    read_window,
    windows_by_type,
)


def _parse(config: Config) -> Architecture:
    plain = plain_architecture(config, "mistral", positions=131_072, kv_heads=8)
    return replace(plain, windows=windows_of_all(config, plain.num_layers, 4096))


def windows_of_all(config: Config, num_layers: int, default: int | None) -> tuple[int | None, ...]:
    """The same window in every layer: ``sliding_window``, or ``default`` if the file has none."""
    window = read_window(config, default)
    kinds = read_layer_types(config, num_layers)
    if window is not None and kinds is not None and FULL in kinds:
        raise config.error(
            f"layer_types has {FULL}, which transformers ignores in a Mistral model with a sliding_window; remove one "
            "of the two"
        )
    kinds = kinds or [SLIDING if window else FULL] * num_layers
    return windows_by_type(config, kinds, window, "sliding_window")


MISTRAL = Family("mistral", "MistralForCausalLM", _parse, LLAMA_LAYER)
