"""Exits with positions resolved to layer numbers and checked against the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.config.schema import ExitConfig, Head, Init
from megatron_ee.errors import ConfigError


@dataclass(frozen=True)
class ExitSpec:
    """One exit after ``layer`` (from 1). Fields as in ``ExitConfig``, with the position resolved."""

    layer: int
    body: str = "mlp"
    head: Head = "own"
    weight: float = 1.0
    rank: int = 64
    init: Init = "copy"
    gate: bool = False


def resolve_exits(exits: Sequence[ExitConfig], num_layers: int) -> tuple[ExitSpec, ...]:
    """Exits in the order of their layers.

    Raises:
        ConfigError: a position is outside the model, two exits have the same layer, or a weight or rank is invalid; the
            message names the key.
    """
    if not exits:
        raise ConfigError("exits: at least one exit is needed")
    specs: dict[int, ExitSpec] = {}
    for index, exit_ in enumerate(exits):
        key = f"exits[{index}]"
        layer = layer_number(exit_.layer, num_layers, f"{key}.layer")
        if layer in specs:
            raise ConfigError(
                f"{key}.layer: there is already an exit after layer {layer}; give each exit its own layer"
            )
        if not 0 < exit_.weight < float("inf"):
            raise ConfigError(f"{key}.weight: must be a positive number, not {exit_.weight}")
        if exit_.rank < 1:
            raise ConfigError(f"{key}.rank: must be at least 1, not {exit_.rank}")
        specs[layer] = ExitSpec(layer, exit_.body, exit_.head, exit_.weight, exit_.rank, exit_.init, exit_.gate)
    return tuple(specs[layer] for layer in sorted(specs))


def layer_number(position: int | float, num_layers: int, key: str) -> int:
    """A layer number (int), or a fraction of the depth (float) rounded to the nearest layer.

    Raises:
        ConfigError: the layer is outside the model, or the float is not a fraction (1.0 is ambiguous: the first layer
            or the whole depth). The message names ``key``.
    """
    if isinstance(position, float):
        if not 0 < position < 1:
            raise ConfigError(
                f"{key}: {position} is neither a layer (a whole number, 1 to {num_layers}) nor a fraction of the depth "
                "(above 0 and below 1)"
            )
        return max(1, round(position * num_layers))
    if not 1 <= position <= num_layers:
        raise ConfigError(f"{key}: {position} is outside the model, which has layers 1 to {num_layers}")
    return position
