"""The one traversal of decoder layers, for tuning, validation, inference and compiled code.

A *depth* is a point between layers: depth 0 is the embedding's output, and depth k the tap of an exit after layer k.
The tap is h_k or, for some exits, the residual r_k between the two halves of layer k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from torch import Tensor

from megatron_ee.model.attention import LayerCache, Positions
from megatron_ee.model.layer import DecoderLayer

Tap = Literal["hidden", "residual"]
"""Kind of an exit's input: h after a layer, or the layer's residual r after attention."""
LayerSource = Callable[[int, int], Iterable[tuple[int, DecoderLayer]]]
"""Yields the layers ``first .. last`` with their numbers, in order. Each is used before the next one is requested."""


def run_segment(
    layers: LayerSource,
    taps: Mapping[int, Tap],
    start: int,
    stop: int,
    x: Tensor,
    positions: Positions,
    cache: Callable[[int], LayerCache | None] = lambda layer: None,
) -> Tensor:
    """Run layers from one depth to another, ignoring taps between them.

    Args:
        layers: the frozen layers.
        taps: kind of tap by depth. It decides where in layers ``start`` and ``stop`` the run begins and ends.
        start: depth of ``x``.
        stop: depth of the result. If it equals ``start``, the result is h after that layer.
        x: ``[seq, batch, hidden]``.
        positions: of the tokens.
        cache: gives a layer's KV cache; None if ``x`` holds whole sequences.

    Returns:
        ``[seq, batch, hidden]``.
    """
    for number, layer in layers(start if taps.get(start) == "residual" else start + 1, stop):
        if number > start:
            x = layer.attention_half(x, positions, cache(number))
            if number == stop and taps.get(stop) == "residual":
                continue
        x = layer.mlp_half(x)
    return x


def run_layers(
    run: Callable[[int, int, Tensor], Tensor],
    taps: Mapping[int, Tap],
    start: int,
    stop: int,
    x: Tensor,
    at_tap: Callable[[int, Tensor], Tensor],
    *,
    to_hidden: bool = False,
) -> Tensor:
    """Run layers from one depth to another, calling ``at_tap`` at each tap on the way and at ``stop``.

    Args:
        run: ``run_segment`` with the current tokens, or equivalent compiled code, from a depth to a depth.
        taps: as in ``run_segment``.
        start: depth of ``x``.
        stop: depth where the run ends.
        x: ``[seq, batch, hidden]``.
        at_tap: called with a depth and its tap. Returns the input of the next layers: the tap, or the tap joined with
            the tokens that were deferred at this depth.
        to_hidden: continue to h after layer ``stop`` if the tap there is the residual.

    Returns:
        ``[seq, batch, hidden]``.
    """
    for depth in (*(layer for layer in sorted(taps) if start < layer < stop), stop):
        if depth > start:
            x = run(start, depth, x)
            if depth in taps:
                x = at_tap(depth, x)
            start = depth
    if to_hidden and taps.get(stop) == "residual":
        x = run(stop, stop, x)
    return x
