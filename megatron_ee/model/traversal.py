"""The one traversal of decoder layers, for tuning, validation, inference and compiled code.

A *depth* is a point between layers: depth 0 is the embedding's output, and depth k the tap of an exit after layer k.
The tap is h_k or, for some exits, the residual r_k between the two halves of layer k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from torch import Tensor

from megatron_ee.model.attention import LayerCache, Positions
from megatron_ee.model.layer import DecoderLayer

T = TypeVar("T")
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
    return run_segments(layers, taps, start, stop, [x], [positions], cache)[0]


def run_segments(
    layers: LayerSource,
    taps: Mapping[int, Tap],
    start: int,
    stop: int,
    xs: list[Tensor],
    positions: Sequence[Positions],
    cache: Callable[[int], LayerCache | None] = lambda layer: None,
) -> list[Tensor]:
    """``run_segment`` for several microbatches, layer by layer: all of them pass a layer before the next one.

    Arguments as for ``run_segment``, one of ``xs`` and ``positions`` per microbatch. Returns ``xs``, whose elements are
    replaced.
    """
    for number, layer in layers(start if taps.get(start) == "residual" else start + 1, stop):
        if number > start:
            for index in range(len(xs)):
                xs[index] = layer.attention_half(xs[index], positions[index], cache(number))
            if number == stop and taps.get(stop) == "residual":
                continue
        for index in range(len(xs)):
            xs[index] = layer.mlp_half(xs[index])
    return xs


def run_layers(
    run: Callable[[int, int, T], T],
    taps: Mapping[int, Tap],
    start: int,
    stop: int,
    x: T,
    at_tap: Callable[[int, T], T],
    *,
    to_hidden: bool = False,
) -> T:
    """Run layers from one depth to another, calling ``at_tap`` at each tap on the way and at ``stop``.

    Args:
        run: ``run_segment`` with the current tokens, or equivalent compiled code, from a depth to a depth; or
            ``run_segments``.
        taps: as in ``run_segment``.
        start: depth of ``x``.
        stop: depth where the run ends.
        x: ``[seq, batch, hidden]``, or a list of them.
        at_tap: called with a depth and its tap. Returns the input of the next layers: the tap, or the tap joined with
            the tokens that were deferred at this depth.
        to_hidden: continue to h after layer ``stop`` if the tap there is the residual.

    Returns:
        The same as ``x``, at depth ``stop``.
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
