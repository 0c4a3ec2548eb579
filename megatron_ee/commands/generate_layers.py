"""Shows generated text with the layer that emitted each token, in a terminal or as an HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from megatron_ee.evaluation.tinted import (
    DEEPEST,
    TINTED_STYLE,
    escaped,
    html_page,
    tinted_answer,
    tints,
    visible,
)
from megatron_ee.tables import add_columns, counted, new_table

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_ee.evaluation.explain import Explanation
    from megatron_ee.inference.offline import ModeResult

_STYLE = "".join(
    [
        TINTED_STYLE,
        "body{font-family:system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}",
        "pre{font:1rem/1.6 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}",
        "ul{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.5rem 1.5rem}",
        "li span{padding:.1rem .4rem}",
        "span{border-radius:.2rem}pre span:hover{outline:1px solid}",
        ".prompt{opacity:.6}li .deepest{outline:1px solid}",
    ]
)
_ANSWER = """{heading}<pre><span class="prompt">{prompt}</span>{output}</pre>
<p>{tokens}</p>
<ul>{legend}</ul>"""


def print_layers(console: Console, prompt: str, pieces: Sequence[str], layers: Sequence[int]) -> None:
    """Print the tokens' texts by layer: in colour on a terminal, else with ``[layer]`` before each run of tokens.

    Control characters of the model's text are replaced by their pictures on a terminal. A pipe gets the text unchanged.
    """
    from rich.text import Text

    counts = sorted(Counter(layers).items())
    styles = {layer: "default" if tint == DEEPEST else tint for layer, tint in tints(sorted(set(layers))).items()}
    coloured = console.color_system is not None
    shown = visible if console.is_terminal else str
    text = Text(shown(prompt), style="default dim")
    for layer, run_ in groupby(zip(layers, pieces, strict=True), key=lambda pair: pair[0]):
        piece = shown("".join(piece for _, piece in run_))
        text.append(piece if coloured else f"[{layer}]{piece}", style=f"not dim {styles[layer]}")
    console.print(text, soft_wrap=True)
    legend = Text(f"\n{len(layers)} tokens")
    for layer, count in counts:
        legend.append(", ").append(f"{count} after layer {layer}", style=styles[layer])
    console.print(legend, soft_wrap=True)


class ShownAnswer(NamedTuple):
    """An answer on a page.

    Attributes:
        prompt: shown dimmed before the output.
        pieces: the text that each token adds.
        layers: the layer that emitted each token.
        confidences: confidence of each token at its exit; None if there is none.
    """

    prompt: str
    pieces: Sequence[str]
    layers: Sequence[int]
    confidences: Sequence[float | None] | None = None


def html_layers(answers: Sequence[ShownAnswer], *, title: str = "megatron-ee generate") -> str:
    """A self-contained HTML page: tokens in colour by layer, a legend with counts, details on hover.

    Args:
        answers: shown one after the other; a colour is the same layer in all of them.
        title: title of the page.
    """
    classes = tints(sorted({layer for answer in answers for layer in answer.layers}))
    parts = []
    for number, answer in enumerate(answers, 1):
        heading = f"<h2>Answer {number} of {len(answers)}</h2>\n" if len(answers) > 1 else ""
        parts.append(_html_answer(answer, classes, heading))
    return html_page(title, _STYLE, "\n".join([f"<h1>{escaped(title)}</h1>", *parts]))


def _html_answer(answer: ShownAnswer, classes: Mapping[int, str], heading: str) -> str:
    prompt, pieces, layers, confidences = answer
    known = [None] * len(layers) if confidences is None else confidences
    counts = sorted(Counter(layers).items())
    titles = [_tooltip(number, *pair) for number, pair in enumerate(zip(layers, known, strict=True), 1)]
    legend = [
        f'<li><span class="{classes[layer]}">layer {layer}</span> {count} ({count / len(layers):.0%})</li>'
        for layer, count in counts
    ]
    mean = f", mean layer {sum(layers) / len(layers):.1f}" if layers else ""
    return _ANSWER.format(
        heading=heading,
        prompt=escaped(prompt),
        output=tinted_answer(pieces, [classes[layer] for layer in layers], titles=titles),
        tokens=f"{counted(len(layers), 'token')}{mean}",
        legend="".join(legend),
    )


def _tooltip(number: int, layer: int, confidence: float | None) -> str:
    known = "" if confidence is None else f", confidence {confidence:.3f}"
    return f"token {number}: layer {layer}{known}"


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


def print_explanation(console: Console, one: Explanation) -> None:
    """Print where an answer departs from full mode's, and a table of the exits."""
    table = new_table("What the exits would have said", console)
    add_columns(table, "exit after layer", words=True)
    drafts = one.request.mode == "speculative"
    add_columns(table, "leaves at", "drafted" if drafts else "emitted", "says the answer's", "says the final exit's")
    count = len(one.tokens)
    for share in one.by_exit():
        table.add_row(
            f"{share.layer}, final" if share.final else str(share.layer),
            "-" if share.threshold is None else f"{share.threshold:.3g}",
            str(share.emitted),
            f"{share.agrees / count:.0%}",
            f"{share.agrees_with_final / count:.0%}",
        )
    console.print()
    console.print(visible(one.verdict()), soft_wrap=True)
    console.print(table)
