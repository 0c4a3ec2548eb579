"""Generated text with the layer of each token, with and without colours."""

from __future__ import annotations

import io

from rich.console import Console

from megatron_ee.commands.show import print_layers

PIECES, LAYERS = ["def", " f", "[1]", "(x)", ":"], [3, 3, 12, 6, 3]


def shown(**options: object) -> str:
    file = io.StringIO()
    print_layers(Console(file=file, highlight=False, width=20, **options), "# a [b]\n", PIECES, LAYERS)  # type: ignore[arg-type]
    return file.getvalue()


def test_plain_output_marks_runs_of_a_layer() -> None:
    text, legend = shown().split("\n\n")
    assert text == "# a [b]\n[3]def f[12][1][6](x)[3]:"
    assert legend == "5 tokens, 3 after layer 3, 1 after layer 6, 1 after layer 12\n"


def test_a_terminal_gets_colours() -> None:
    text = shown(force_terminal=True, color_system="standard", _environ={})
    assert "\x1b[32mdef f\x1b[0m" in text  # green, the shallowest exit
    assert "\x1b[36m(x)\x1b[0m" in text  # cyan, the next
    assert "[12]" not in text.split("tokens")[0]


def test_no_tokens() -> None:
    file = io.StringIO()
    print_layers(Console(file=file), "prompt", [], [])
    assert file.getvalue() == "prompt\n\n0 tokens\n"
