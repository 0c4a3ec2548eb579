"""Examples where early exit's answer is not full mode's."""

from __future__ import annotations

from megatron_ee.errors import printable
from megatron_ee.evaluation.page.answers_section import how_to_evaluate
from megatron_ee.evaluation.page.blocks import Block, Examples, Paragraph, Section, ShownExample
from megatron_ee.evaluation.page.departures import Departed, departed_rows, mark_departure
from megatron_ee.evaluation.page.material import Material, quality_of

MOST_TEXT = 600
"""Characters of a question."""


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
    verdict = t(f"examples.{change}" if departed.judged else "examples.unjudged")
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
