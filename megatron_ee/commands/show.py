"""Shows generated text with the layer that emitted each token, in a terminal or as an HTML page."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from megatron_ee.checkpoint.ownership import MADE_BY
from megatron_ee.tables import add_columns, new_table

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_ee.inference.offline import ModeResult

COLOURS = {"green": 130, "cyan": 185, "yellow": 50, "magenta": 300, "blue": 225, "red": 5}
"""Names in a terminal, and hues on a page, from the shallowest layer on. The deepest layer has no colour."""

_JOINERS = "\u200c\u200d"  # parts of emoji, and of letters in several scripts
_STYLE = "".join(
    [
        ":root{color-scheme:light dark;--light:85%}",
        "@media(prefers-color-scheme:dark){:root{--light:28%}}",
        "body{font-family:system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}",
        "pre{font:1rem/1.6 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}",
        "ul{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.5rem 1.5rem}",
        "li span{padding:.1rem .4rem}",
        "span{border-radius:.2rem}pre span:hover{outline:1px solid}",
        ".prompt{opacity:.6}.deepest{background:none}li .deepest{outline:1px solid}",
        *(f".{name}{{background:hsl({hue} 70% var(--light))}}" for name, hue in COLOURS.items()),
    ]
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{generator}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<pre><span class="prompt">{prompt}</span>{output}</pre>
<p>{tokens}</p>
<ul>{legend}</ul>
</body>
</html>
"""


def print_layers(console: Console, prompt: str, pieces: Sequence[str], layers: Sequence[int]) -> None:
    """Print the tokens' texts by layer: in colour on a terminal, else with ``[layer]`` before each run of tokens.

    Control characters of the model's text are replaced by their pictures on a terminal. A pipe gets the text unchanged.
    """
    from rich.text import Text

    counts = sorted(Counter(layers).items())
    styles = _by_layer(counts, "default")
    coloured = console.color_system is not None
    shown = _visible if console.is_terminal else str
    text = Text(shown(prompt), style="default dim")
    for layer, run_ in groupby(zip(layers, pieces, strict=True), key=lambda pair: pair[0]):
        piece = shown("".join(piece for _, piece in run_))
        text.append(piece if coloured else f"[{layer}]{piece}", style=f"not dim {styles[layer]}")
    console.print(text, soft_wrap=True)
    legend = Text(f"\n{len(layers)} tokens")
    for layer, count in counts:
        legend.append(", ").append(f"{count} after layer {layer}", style=styles[layer])
    console.print(legend, soft_wrap=True)


def html_layers(
    prompt: str,
    pieces: Sequence[str],
    layers: Sequence[int],
    confidences: Sequence[float | None] | None = None,
    *,
    title: str = "megatron-ee generate",
) -> str:
    """A self-contained HTML page: tokens in colour by layer, a legend with counts, details on hover.

    Args:
        prompt: shown dimmed before the output.
        pieces: the text that each token adds.
        layers: the layer that emitted each token.
        confidences: confidence of each token at its exit; None if there is none.
        title: title of the page.
    """
    known = [None] * len(layers) if confidences is None else confidences
    counts = sorted(Counter(layers).items())
    classes = _by_layer(counts, "deepest")
    spans = [
        f'<span class="{classes[layer]}" title="{_tooltip(number, layer, confidence)}">{_escaped(piece)}</span>'
        for number, (piece, layer, confidence) in enumerate(zip(pieces, layers, known, strict=True), 1)
    ]
    legend = [
        f'<li><span class="{classes[layer]}">layer {layer}</span> {count} ({count / len(layers):.0%})</li>'
        for layer, count in counts
    ]
    mean = f", mean layer {sum(layers) / len(layers):.1f}" if layers else ""
    return _PAGE.format(
        generator=MADE_BY,
        title=_escaped(title),
        style=_STYLE,
        prompt=_escaped(prompt),
        output="".join(spans),
        tokens=f"{len(layers)} token{'' if len(layers) == 1 else 's'}{mean}",
        legend="".join(legend),
    )


def _by_layer(counts: Sequence[tuple[int, int]], deepest: str) -> dict[int, str]:
    """A colour for each layer of ``counts``, which is ordered by layer."""
    names = list(COLOURS)
    named = {layer: names[rank % len(names)] for rank, (layer, _) in enumerate(counts[:-1])}
    return named | {layer: deepest for layer, _ in counts[-1:]}


def _tooltip(number: int, layer: int, confidence: float | None) -> str:
    known = "" if confidence is None else f", confidence {confidence:.3f}"
    return f"token {number}: layer {layer}{known}"


def _escaped(text: str) -> str:
    return html.escape(_visible(text))


def _visible(text: str) -> str:
    """``text`` with control characters, but for line ends and tabs, replaced by their pictures.

    Marks that reorder text, and lone surrogates, which no file can hold, are shown as escapes.
    """
    return "".join(char if char.isprintable() or char in "\n\t" else _picture(char) for char in text)


def _picture(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if char in _JOINERS or (char.isspace() and code >= 0xA0):
        return char
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def print_modes(console: Console, results: Sequence[ModeResult]) -> None:
    """Print a table of time, speed and agreement per mode."""
    table = new_table("The same prompts in every mode", console)
    add_columns(table, "mode", words=True)
    add_columns(table, "seconds", "tokens/s", "speed", "exit layer", "layers per token", "agreement")
    full = results[0].tokens_per_second
    for each in results:
        table.add_row(
            each.mode,
            f"{each.seconds:.2f}",
            f"{each.tokens_per_second:.1f}",
            f"{each.tokens_per_second / full:.2f}x",
            f"{each.mean_exit_layer:.1f}",
            f"{each.layers_per_token:.1f}",
            f"{each.agreement:.1%}",
        )
    console.print(table)
