"""Generated text with the layer of each token: in a terminal with and without colours, and as a page."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megatron_ee.checkpoint.atomic import write_file
from megatron_ee.commands import generate_layers
from megatron_ee.commands.generate_layers import ShownAnswer, print_layers
from megatron_ee.evaluation.tinted import HUES

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


def test_a_terminal_is_not_steered_by_what_a_model_writes() -> None:
    for terminal, expected in ((True, "a\u241b[2Jb\\u202ec"), (False, "a\x1b[2Jb\u202ec")):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, color_system=None, highlight=False)
        print_layers(console, "a\x1b[2J", ["b\u202ec"], [3])
        assert expected == file.getvalue().split("\n")[0].replace("[3]", "")


# -- the page


def html_layers(*answer: Any, title: str = "megatron-ee generate") -> str:
    """The page of one answer."""
    return generate_layers.html_layers([ShownAnswer(*answer)], title=title)


class Page(HTMLParser):
    """What a browser would find: the tags, and each ``span`` of the text and of the legend."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.spans: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)
        if tag == "span":
            self.spans.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "span":
            self.spans[-1] = self.spans[-1][0], self.spans[-1][1] + data
        if "pre" in self._open:
            self.text += data

    def of_text(self) -> list[tuple[dict[str, str | None], str]]:
        """Prompt and tokens."""
        return [span for span in self.spans if not span[1].startswith("layer ") or "title" in span[0]]


def structure(page: Page) -> list[str]:
    return [tag for tag, _ in page.tags]


def test_page_shows_tokens_by_layer_with_details() -> None:
    source = html_layers("# a [b]\n", PIECES, LAYERS, [0.91, 0.5, None, 0.12345, 1.0])
    page = Page(source)
    prompt, *tokens = page.of_text()
    assert prompt == ({"class": "prompt"}, "# a [b]\n")
    assert [text for _, text in tokens] == PIECES
    assert [attributes["class"] for attributes, _ in tokens] == ["green", "green", "deepest", "cyan", "green"]
    assert [attributes["title"] for attributes, _ in tokens] == [
        "token 1: layer 3, confidence 0.910",
        "token 2: layer 3, confidence 0.500",
        "token 3: layer 12",
        "token 4: layer 6, confidence 0.123",
        "token 5: layer 3, confidence 1.000",
    ]
    assert page.text == "# a [b]\n" + "".join(PIECES)
    legend = re.findall(r'<li><span class="(\w+)">layer (\d+)</span> (\d+) \((\d+)%\)', source)
    assert legend == [("green", "3", "3", "60"), ("cyan", "6", "1", "20"), ("deepest", "12", "1", "20")]
    assert "5 tokens, mean layer 5.4" in source


def test_a_page_of_several_answers_has_one_colour_per_layer() -> None:
    source = generate_layers.html_layers(
        [ShownAnswer("one", ["a", "b"], [3, 12]), ShownAnswer("two", ["c", "d"], [6, 12])]
    )
    assert re.findall("<h2>(.*?)</h2>", source) == ["Answer 1 of 2", "Answer 2 of 2"]
    classes = [attributes["class"] for attributes, _ in Page(source).of_text()]
    assert classes == ["prompt", "green", "deepest", "prompt", "cyan", "deepest"]


def test_page_needs_nothing_else_and_suits_both_schemes() -> None:
    source = html_layers("p", PIECES, LAYERS)
    assert not re.search(r"(?i)<(script|link|img|iframe|base|object)|src=|href=|url\(|@import|https?:", source)
    assert "default-src 'none'" in source
    assert "color-scheme:light dark" in source and "prefers-color-scheme:dark" in source
    for name in ("prompt", "deepest", *HUES):  # every class that spans are given has its rule
        assert f".{name}{{" in source


def test_page_of_many_layers_and_of_none() -> None:
    layers = list(range(1, 12))
    tokens = Page(html_layers("", ["x"] * 11, layers)).of_text()[1:]
    classes = [attributes["class"] for attributes, _ in tokens]
    assert classes == [*HUES, *list(HUES)[:4], "deepest"]
    page = Page(html_layers("prompt", [], []))
    assert page.of_text() == [({"class": "prompt"}, "prompt")]
    assert "<p>0 tokens</p>" in html_layers("prompt", [], [])
    assert "<p>1 token, mean layer 4.0</p>" in html_layers("prompt", ["a"], [4])


HOSTILE = [
    "<script>alert(1)</script>",
    "</span></pre></body></html>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "&lt;b&gt; &amp; &#60;",
    "<!-- ",
    "]]>",
    "</title><script>",
    "</style>",
    "{prompt}{0}%s{{",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    harmless = Page(html_layers("a", ["b", "c"], [1, 2], title="d"))
    page = Page(html_layers(text, [text, text], [1, 2], title=text))
    assert structure(page) == structure(harmless)
    assert [attributes.keys() for _, attributes in page.tags] == [attributes.keys() for _, attributes in harmless.tags]
    assert [shown for _, shown in page.of_text()] == [text] * 3


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("<>&\"'/!-= ab{}#;x\n"), max_size=8), min_size=1, max_size=8))
def test_any_text_stays_text(pieces: list[str]) -> None:
    page = Page(html_layers("p", pieces, [1] * len(pieces)))
    assert page.text == "p" + "".join(pieces)
    assert structure(page)[-1] == "span" and structure(page).count("span") == len(pieces) + 2


def test_control_characters_are_shown_and_the_page_can_be_written(tmp_path: Path) -> None:
    pieces = ["\x00", "\r", "\x1b[31m", "\x7f", "\u202egpj.exe", "\ud800", "\x85", "\ufeff", "\U000e0041"]
    kept = ["\t", "\n", "\xa0", "\u3000", "👩🏽\u200d🚀", "❤\ufe0f", "漢字", "Łódź", "\ufffd"]
    page = Page(html_layers("", pieces + kept, [1] * 18))
    assert [text for _, text in page.of_text()[1:]] == [
        *("\u2400", "\u240d", "\u241b[31m", "\u2421", "\\u202egpj.exe", "\\ud800", "\\u0085", "\\ufeff"),
        "\\U000e0041",
        *kept,
    ]
    write_file(tmp_path / "page.html", html_layers("", pieces + kept, [1] * 18).encode())
    assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).spans == page.spans


def test_page_refuses_lists_that_do_not_match() -> None:
    with pytest.raises(ValueError):
        html_layers("", ["a", "b"], [1])
    with pytest.raises(ValueError):
        html_layers("", ["a"], [1], [0.5, 0.6])
