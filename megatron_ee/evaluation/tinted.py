"""Answers as HTML: each token tinted by the layer that emitted it, and marked where another answer says something else.

Pure functions of texts and numbers, for all pages that show answers. ``TINTED_STYLE`` has the rules that they need.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from difflib import SequenceMatcher
from itertools import takewhile

from megatron_ee.checkpoint.ownership import MADE_BY

HUES = {"green": 130, "cyan": 185, "yellow": 50, "magenta": 300, "blue": 225, "red": 5}
"""Names in a terminal, and hues on a page, from the shallowest layer on. The deepest layer has no colour."""
DEEPEST = "deepest"
"""Class of the deepest layer."""

TINTED_STYLE = "".join(
    [
        ":root{color-scheme:light dark;--tint:70% 85%;--mark:#b3261e}",
        "@media(prefers-color-scheme:dark){:root{--tint:45% 26%;--mark:#ff8a80}}",
        "@media print{:root{color-scheme:light;--tint:70% 85%;--mark:#b3261e}}",
        *(f".{name}{{background:hsl({hue} var(--tint))}}" for name, hue in HUES.items()),
        f".{DEEPEST}{{background:none}}",
        "a.token{color:inherit;text-decoration:none;print-color-adjust:exact;-webkit-print-color-adjust:exact}",
        ".different,a.token.different{text-decoration:underline var(--mark) 1.5px;text-underline-offset:.3em;",
        "text-decoration-skip-ink:none}",
        ".departure{border-left:3px solid var(--mark)}",
        ".unseen{opacity:.6;font-size:.8em}",
        '.line::before{content:"\\21b5";opacity:.6}',  # a line end alone would show no tint
    ]
)
"""Rules for the classes of this module, light, dark and printed."""
_PAGE = """<!DOCTYPE html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{generator}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_JOINERS = "\u200c\u200d"  # parts of emoji, and of letters in several scripts


def html_page(title: str, style: str, body: str, *, language: str = "en") -> str:
    """A self-contained page, without scripts, and without anything from elsewhere.

    Args:
        title: plain text.
        style: rules, with ``TINTED_STYLE`` if the body has tinted answers.
        body: HTML; what comes from elsewhere is ``escaped`` in it.
        language: of the page's own words.
    """
    return _PAGE.format(generator=MADE_BY, title=escaped(title), style=style, body=body, language=language)


def tints(layers: Sequence[int]) -> dict[int, str]:
    """A class for each of ``layers``, which ascend: a name of ``HUES``, and ``DEEPEST`` for the last one."""
    names = list(HUES)
    named = {layer: names[rank % len(names)] for rank, layer in enumerate(layers[:-1])}
    return named | {layer: DEEPEST for layer in layers[-1:]}


def tinted_answer(
    pieces: Sequence[str],
    classes: Sequence[str],
    *,
    titles: Sequence[str] | None = None,
    different: Collection[int] = (),
    departure: int | None = None,
    unseen: Sequence[str] | None = None,
    link: str | None = None,
) -> str:
    """The tokens of an answer, for a ``pre`` element: one element per token, tinted and marked.

    Args:
        pieces: the text that each token adds.
        classes: the tint of each token, from ``tints``; empty for none.
        titles: shown on hover; None for none.
        different: indices of the tokens to mark as different, see ``differences``.
        departure: index of the first token that differs, which gets a mark of its own; None for none.
        unseen: what to show in place of each token that adds no text, such as an end of text; None for nothing.
        link: makes each token a link to the element ``LINK-INDEX``, from 0; None for none.

    Raises:
        ValueError: the lists have different lengths.
    """
    if titles is not None and len(titles) != len(pieces):
        raise ValueError(f"{len(titles)} titles for {len(pieces)} tokens")
    parts = []
    for index, (piece, tint) in enumerate(zip(pieces, classes, strict=True)):
        marks = [mark for mark, on in (("different", index in different), ("departure", index == departure)) if on]
        text = escaped(piece)
        if not piece and unseen is not None and unseen[index]:
            marks, text = [*marks, "unseen"], escaped(unseen[index])
        if piece and not piece.strip("\n"):
            marks.append("line")
        tag = "span" if link is None else "a"
        attributes = "" if link is None else f' href="#{html.escape(link)}-{index}"'
        names = " ".join(filter(None, [tint, *marks, *(["token"] if link is not None else [])]))
        attributes += f' class="{names}"' if names else ""
        attributes += "" if titles is None else f' title="{escaped(titles[index])}"'
        parts.append(f"<{tag}{attributes}>{text}</{tag}>")
    return "".join(parts)


def differences(mine: Sequence[int], other: Sequence[int]) -> tuple[frozenset[int], frozenset[int]]:
    """The tokens of two answers that the other one does not have in this order, as indices.

    The answers are aligned, so a token that one of them leaves out does not make all later ones different. Tokens
    before the first place that differs are equal.
    """
    same = sum(takewhile(bool, (one == two for one, two in zip(mine, other, strict=False))))
    mine_left, other_left = set(range(same, len(mine))), set(range(same, len(other)))
    # Without autojunk: it ignores tokens that are frequent in long answers, which would then all count as different.
    for block in SequenceMatcher(None, mine[same:], other[same:], autojunk=False).get_matching_blocks():
        mine_left -= set(range(same + block.a, same + block.a + block.size))
        other_left -= set(range(same + block.b, same + block.b + block.size))
    # The alignment may match the token at the first place that differs with a later one.
    return frozenset(mine_left | set(range(same, min(same + 1, len(mine))))), frozenset(
        other_left | set(range(same, min(same + 1, len(other))))
    )


def marked_spaces(text: str) -> str:
    """The text of a token by itself: line ends, tabs, and the spaces around it, are shown as signs."""
    inner = text.strip(" ")
    first = text.index(inner) if inner else len(text)
    signs = inner.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return "\u2423" * first + signs + "\u2423" * (len(text) - first - len(inner))


def escaped(text: str) -> str:
    """``text`` for HTML, made ``visible``."""
    return html.escape(visible(text))


def visible(text: str) -> str:
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
