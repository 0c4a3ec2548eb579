"""How early exit treats groups of records."""

from __future__ import annotations

from megatron_ee.errors import printable
from megatron_ee.evaluation.groups.compare import (
    AGREEMENT,
    LAYERS,
    LOSS,
    QUALITY,
    SIGNIFICANCE,
    GroupComparison,
    GroupFigure,
)
from megatron_ee.evaluation.groups.tasks import NO_GROUP
from megatron_ee.evaluation.page.answers_section import MOST_ROWS, how_to_evaluate
from megatron_ee.evaluation.page.blocks import Block, Cell, CommandLine, PageTable, Paragraph, Picture, Section
from megatron_ee.evaluation.page.material import Material
from megatron_ee.evaluation.page.svg import MEAN, WORSE, Interval95, draw_intervals

BY = {"group": "by.group", "script": "by.script"}
MEASURES = {LAYERS: "measure.layer", AGREEMENT: "measure.agreement", QUALITY: "measure.quality", LOSS: "measure.loss"}
"""Keys of their names. The order is that of the columns."""


def groups_section(material: Material) -> Section:
    """What early exit does for each group of records, in the chosen setting."""
    t, tasks = material.t, material.tasks
    found = next((each for each in material.measured.tasks if each.groups), None)
    if tasks is None or found is None:
        how = how_to_evaluate(material, "--by", "group", *(["--resume"] if tasks is not None else []))
        blocks: list[Block] = [Paragraph(t("groups.missing"), "note"), CommandLine(t("groups.how"), how.command)]
        return Section("groups", t("groups.title"), blocks)
    chosen = material.chosen[0] if material.chosen is not None else ""
    name = chosen if chosen in found.groups else next(iter(found.groups))
    compared = found.groups[name]
    blocks = [Paragraph(risk_sentence(material, compared), "verdict")]
    blocks += _groups_blocks(material, name, compared)
    small = [
        t("groups.member", name=group_label(material, g.name), count=t.number(g.members))
        for g in compared.groups
        if g.too_small
    ]
    if small:
        blocks.append(Paragraph(t("groups.small", names=t.joined(small, MOST_ROWS)), "note"))
    blocks.append(Paragraph(t("groups.explain", level=t.number(100 * SIGNIFICANCE)), "explain"))
    return Section("groups", t("groups.title"), blocks, [str(found.path)])


def group_label(material: Material, name: str) -> str:
    """The name of a group as it is shown."""
    return material.t("groups.unnamed") if name == NO_GROUP else printable(name)


def risk_sentence(material: Material, compared: GroupComparison) -> str:
    """Whether some groups carry more risk than the others."""
    t, riskier = material.t, compared.riskier
    if not compared.large_enough:
        return t("groups.none_judged")
    if all((figure := group.figures.get(compared.risk)) is None or figure.p is None for group in compared.large_enough):
        return t("groups.nothing_tested")  # such as one group alone
    if not riskier:
        return t("groups.no_difference")
    named = t.joined((group_label(material, group.name) for group in riskier), MOST_ROWS)
    return t("groups.riskier", names=named, measure=t(MEASURES[compared.risk]))


def _groups_blocks(material: Material, name: str, compared: GroupComparison) -> list[Block]:
    t = material.t
    measures = [each for each in MEASURES if each in compared.overall]
    certified = compared.certified is not None
    columns = [t("column.group"), t("column.rows"), *(t(MEASURES[each]) for each in measures)]
    columns += [t("groups.bound")] if certified else []
    rows = []
    for group in compared.large_enough[:MOST_ROWS]:
        cells = [Cell(group_label(material, group.name), own=True), Cell(t.number(group.members))]
        cells += [_figure_cell(material, group.figures.get(each), each) for each in measures]
        if certified:
            cells.append(Cell("-" if group.largest_loss is None else t.percent(group.largest_loss)))
        rows.append(cells)
    if not rows:
        return []
    caption = t("groups.table", setting=material.setting(name), by=t(BY.get(compared.by, "by.length")))
    if len(compared.large_enough) > MOST_ROWS:
        caption += t("sentence.space") + t("table.cut", shown=MOST_ROWS, count=t.number(len(compared.large_enough)))
    blocks: list[Block] = [PageTable(caption, columns, rows)]
    drawn = [
        Interval95(
            group_label(material, group.name), 100 * figure.low, 100 * figure.mean, 100 * figure.high, figure.worse
        )
        for group in compared.large_enough[:MOST_ROWS]
        if (figure := group.figures.get(compared.risk)) is not None
    ]
    if len(drawn) > 1:
        measure, overall = t(MEASURES[compared.risk]), 100 * compared.overall[compared.risk]
        svg = draw_intervals("groups", drawn, overall, x_label=t("answers.plot.y", score=measure))
        legend = [(MEAN, t("groups.plot.mean"))]
        if any(each.chosen for each in drawn):
            legend.append((WORSE, t("groups.plot.worse")))
        lowest, highest = (choose(drawn, key=lambda each: each.mean) for choose in (min, max))
        ends = {"low": t.number(lowest.mean, 1) + "%", "high": t.number(highest.mean, 1) + "%"}
        names = {"lowest": lowest.name[:80], "highest": highest.name[:80]}
        alt = t("groups.plot.alt", count=len(drawn), **ends, **names)
        blocks.insert(0, Picture(svg, t("groups.plot", measure=measure), alt, legend))
    return blocks


def _figure_cell(material: Material, figure: GroupFigure | None, measure: str) -> Cell:
    t = material.t
    if figure is None:
        return Cell(t("groups.too_small"))
    values = (figure.mean, figure.low, figure.high)
    if measure == LAYERS:
        mean, low, high = (t.number(value, 1) for value in values)
    elif measure == QUALITY:
        mean, low, high = (t.points(value) for value in values)
    else:
        mean, low, high = (t.percent(value) for value in values)
    worse, differs = figure.worse, figure.p is not None and figure.p <= SIGNIFICANCE
    text = t("groups.worse", value=mean) if worse else t("groups.differs", value=mean) if differs else mean
    return Cell(text, t("range", low=low, high=high), "bad" if worse else "")
