"""Examples where early exit's answer is not full mode's: which are shown, and where their texts depart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import regex

from megatron_ee.errors import printable
from megatron_ee.evaluation.page.answers_section import how_to_evaluate
from megatron_ee.evaluation.page.blocks import Block, Examples, MarkedText, Paragraph, Section, ShownExample
from megatron_ee.evaluation.page.material import Material, quality_of
from megatron_ee.evaluation.page.task_file import ScoredRow, WrittenAnswer
from megatron_ee.evaluation.tasks.metrics import is_spaceless
from megatron_ee.evaluation.tasks.results import BASELINE, PREFERRED_QUALITY

MOST_TEXT = 600
"""Characters of a question."""
BEFORE, AFTER = 400, 800
"""Characters of an answer that are shown before and after the place where it departs."""
LONGEST_WORD = 40
COMPARED = 20_000
"""Characters of an answer in which the place is looked for."""
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_GRAPHEME = regex.compile(r"\X")
_WORD = regex.compile(r"\s*([\w\p{M}]+|\X)")


@dataclass(frozen=True)
class Departed:
    """A record whose early answer is not full mode's.

    Attributes:
        row: the record with its scores.
        full, early: the answers.
        change: quality of the early answer minus full mode's; 0 where there is none.
        has_quality: whether there is one.
        place: number of the first token that differs, from 1.
    """

    row: ScoredRow
    full: WrittenAnswer
    early: WrittenAnswer
    change: float
    has_quality: bool
    place: int


def examples_section(material: Material) -> Section:
    """Examples where early exit's answer is not full mode's."""
    t, tasks = material.t, material.tasks
    if tasks is None or material.chosen is None or tasks.answers is None or not tasks.content.rows:
        text = t("examples.missing") if tasks is None or material.chosen is not None else t("examples.no_setting")
        return Section("examples", t("examples.title"), [Paragraph(text, "note"), how_to_evaluate(material)])
    chosen = material.chosen[0]
    answered = sum((chosen, row.id) in material.answers for row in tasks.content.rows)
    departed = departed_rows(tasks.content.rows, material.answers, chosen)
    lost, gained = sum(each.change < 0 for each in departed), sum(each.change > 0 for each in departed)
    counts = {"count": t.number(len(departed)), "answers": t.number(answered), "setting": material.setting(chosen)}
    blocks: list[Block] = [Paragraph(t("examples.count", **counts), "verdict")]
    if quality_of(tasks.content.overall[chosen]) is not None and departed:
        blocks.append(Paragraph(t("examples.changes", lost=t.number(lost), gained=t.number(gained))))
    shown = departed[: material.most_examples]
    if shown:
        blocks.append(Paragraph(t("examples.order", shown=t.number(len(shown))), "note"))
        blocks.append(Examples([_example(material, each) for each in shown]))
    return Section("examples", t("examples.title"), blocks, [str(tasks.path), str(tasks.answers)])


def _example(material: Material, departed: Departed) -> ShownExample:
    t, row = material.t, departed.row
    full, early = mark_departure(departed.full.text, departed.early.text)
    change = "lost" if departed.change < 0 else "gained" if departed.change > 0 else "same"
    verdict = t(f"examples.{change}" if departed.has_quality else "examples.unjudged")
    if departed.full.text == departed.early.text:
        verdict = t("examples.same_text")
    where = t("examples.place", place=t.number(departed.place))
    return ShownExample(
        title=printable(row.id),
        prompt=cut(row.prompt or ""),
        references=t.joined(printable(each) for each in row.references[:5]),
        full=full,
        early=early,
        verdict=verdict + t("sentence.space") + where,
        mark={"lost": "bad", "gained": "good", "same": ""}[change],
    )


def cut(text: str) -> str:
    """A text of at most ``MOST_TEXT`` characters, whose middle may be left out."""
    if len(text) <= MOST_TEXT:
        return text
    return f"{text[: MOST_TEXT // 2]} \N{HORIZONTAL ELLIPSIS} {text[-MOST_TEXT // 2 :]}"


def departed_rows(
    rows: Sequence[ScoredRow], answers: Mapping[tuple[str, str], WrittenAnswer], setting: str
) -> list[Departed]:
    """The records whose answers differ: first those that lost quality, then those that gained, then the others."""
    found = []
    for row in rows:
        early, full = answers.get((setting, row.id)), answers.get((BASELINE, row.id))
        place = row.settings.get(setting, {}).get("departure")
        if early is None or full is None or not isinstance(place, int):
            continue
        change = quality_change(row, setting)
        found.append(Departed(row, full, early, change or 0.0, change is not None, place + 1))
    return sorted(found, key=_order)


def _order(departed: Departed) -> tuple[bool, bool, float, bool]:
    change = departed.change
    return change >= 0, change == 0, -abs(change), departed.full.text == departed.early.text


def quality_change(row: ScoredRow, setting: str) -> float | None:
    """Quality of a row in a setting minus that in full mode; None if it has none."""
    early, full = row.settings.get(setting, {}), row.settings.get(BASELINE, {})
    for name in PREFERRED_QUALITY:
        if isinstance(early.get(name), int | float) and isinstance(full.get(name), int | float):
            return float(early[name]) - float(full[name])
    return None


def mark_departure(full: str, early: str) -> tuple[MarkedText, MarkedText]:
    """Both texts in three parts: what they have in common, the first word that differs, and the rest.

    The place is the beginning of a word, or of a character in scripts without spaces. Long texts are cut around it.
    """
    place = _common(full[:COMPARED], early[:COMPARED])
    return _marked(full, place), _marked(early, place)


def _common(one: str, other: str) -> int:
    """Length of the common beginning, without a part of a word or of a character."""
    place = 0
    for mine, theirs in zip(_GRAPHEME.findall(one), _GRAPHEME.findall(other), strict=False):
        if mine != theirs:
            break
        place += len(mine)
    if max(len(one), len(other)) == place:  # the texts are equal
        return place
    start = place
    while start > 0 and place - start < LONGEST_WORD and _in_word(one, start) + _in_word(other, start):
        start -= 1
    return start if place - start < LONGEST_WORD else place


def _in_word(text: str, place: int) -> bool:
    """Whether a place is inside a word of letters or digits."""
    if not 0 < place < len(text):
        return False
    left, right = text[place - 1], text[place]
    return left.isalnum() and right.isalnum() and not (is_spaceless(left) or is_spaceless(right))


def _marked(text: str, place: int) -> MarkedText:
    start, at = len(text), ""
    if text[place:].strip():
        if is_spaceless(text[place]):
            start, at = place, _GRAPHEME.match(text, place)[0]
        else:
            found = _WORD.match(text, place)
            start, at = found.start(1), found[1][:LONGEST_WORD]
    before, after = text[:start], text[start + len(at) :]
    if len(before) > BEFORE:
        before = ELLIPSIS + before[-BEFORE:]
    if len(after) > AFTER:
        after = after[:AFTER] + ELLIPSIS
    return MarkedText(before, at, after)
