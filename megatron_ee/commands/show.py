"""Generated text that shows which layer emitted each token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = ("green", "cyan", "yellow", "magenta", "blue", "red")  # shallowest first; the deepest layer has none


def print_layers(console: Console, prompt: str, pieces: Sequence[str], layers: Sequence[int]) -> None:
    """Print the tokens' texts by layer, in colour on a terminal, else each run of one layer behind its ``[number]``."""
    from rich.text import Text

    counts = sorted(Counter(layers).items())
    styles = {layer: COLOURS[rank % len(COLOURS)] for rank, (layer, _) in enumerate(counts)}
    if counts:
        styles[counts[-1][0]] = "default"
    coloured = console.color_system is not None
    text = Text(prompt, style="default dim")
    for layer, run_ in groupby(zip(layers, pieces, strict=True), key=lambda pair: pair[0]):
        piece = "".join(piece for _, piece in run_)
        text.append(piece if coloured else f"[{layer}]{piece}", style=f"not dim {styles[layer]}")
    console.print(text, soft_wrap=True)
    legend = Text(f"\n{len(layers)} tokens")
    for layer, count in counts:
        legend.append(", ").append(f"{count} after layer {layer}", style=styles[layer])
    console.print(legend, soft_wrap=True)
