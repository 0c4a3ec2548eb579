"""How fast and how good the answers are."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ee.errors import printable
from megatron_ee.evaluation.page.blocks import (
    Block,
    Cell,
    CommandLine,
    FactList,
    PageTable,
    Paragraph,
    Picture,
    Section,
)
from megatron_ee.evaluation.page.material import EQUAL_ANSWERS, Material, quality_of
from megatron_ee.evaluation.page.sources import CorpusFile, TimedMode
from megatron_ee.evaluation.page.svg import CHOSEN, CURVE, OTHERS, Interval95, draw_trade
from megatron_ee.evaluation.page.task_file import TaskFile
from megatron_ee.evaluation.tasks.results import BASELINE, MeanScore, SettingResult

SHOWN_SCORES = ("contains", "f1", "accuracy", "equal_answers")
"""Scores in the tables of the page. The file has more."""
THRESHOLD = "threshold "
"""Beginning of the names of settings that are joined by a line."""
MOST_ROWS = 30
"""Rows of a table or figure of groups or tasks."""


def answers_section(material: Material) -> Section:
    """Speed and quality of each setting, and by task."""
    t, tasks = material.t, material.tasks
    if tasks is None:
        blocks: list[Block] = [Paragraph(t("answers.missing"), "note"), how_to_evaluate(material)]
        blocks += [block for corpus in material.measured.corpora for block in _corpus_blocks(material, corpus)]
        return Section("answers", t("answers.title"), blocks, [str(each.path) for each in material.measured.corpora])
    blocks = []
    for found in material.measured.tasks:
        blocks += _task_blocks(material, found)
    blocks += [Paragraph(t("explain.interval"), "explain"), _meanings(material, tasks)]
    for corpus in material.measured.corpora:
        blocks += _corpus_blocks(material, corpus)
    sources = [*(str(each.path) for each in material.measured.tasks), *(str(c.path) for c in material.measured.corpora)]
    return Section("answers", t("answers.title"), blocks, sources)


def how_to_evaluate(material: Material, *more: str) -> CommandLine:
    """How to measure answers."""
    words = ("--tasks", "questions.jsonl", *more, "--output", "eval")
    return CommandLine(material.t("answers.how"), material.command("evaluate", *words))


def _task_blocks(material: Material, tasks: TaskFile) -> list[Block]:
    t, content = material.t, tasks.content
    results = list(content.overall.values())
    first = tasks is material.tasks
    chosen = material.chosen[0] if material.chosen is not None and material.chosen[0] in content.overall else None
    blocks: list[Block] = []
    if first and material.chosen is not None:
        blocks.append(Paragraph(t(material.chosen[1], setting=material.setting(material.chosen[0])), "verdict"))
    if first and len(results) > 1 and (svg := _trade(material, results, chosen)):
        blocks.append(svg)
    rows = results[0].rows
    caption = t("answers.table", rows=t.number(rows), tasks=t.joined(printable(name) for name in content.tasks))
    blocks.append(_results_table(material, caption, results, chosen))
    blocks.append(Paragraph(_measured_how(material, tasks, chosen), "note"))
    if len(content.tasks) > 1 and chosen is not None:
        blocks.append(_by_task(material, tasks, chosen))
    return blocks


def _measured_how(material: Material, tasks: TaskFile, chosen: str | None) -> str:
    t, timing = material.t, tasks.content.timing
    longest = tasks.content.settings[0].max_tokens
    parts = [t("answers.length", tokens=t.number(longest))]
    if timing.rows:
        batch = t.number(timing.max_num_seqs)
        parts.append(t("answers.timing", rows=t.number(timing.rows), batch=batch))
    speeds = tasks.speeds(chosen) if chosen is not None else []
    if chosen is not None and len(speeds) > 1:
        ends = {"low": t.times(min(speeds)), "high": t.times(max(speeds))}
        parts.append(t("answers.varied", count=len(speeds), setting=material.setting(chosen), **ends))
    return t("sentence.space").join(parts)


def _trade(material: Material, results: Sequence[SettingResult], chosen: str | None) -> Picture | None:
    """The figure of quality against speed; None if one of them was not measured."""
    t = material.t
    timed = [each for each in results if each.speed is not None]
    name = (quality_of(results[0]) or (EQUAL_ANSWERS, None))[0]
    if not timed or name not in results[0].scores:
        return None
    points = []
    for each in timed:
        assert each.speed is not None
        score = each.scores[name]
        low, high = (100 * (score.mean - score.difference + end) for end in (score.low, score.high))
        label = material.setting(each.setting)
        if each.setting.startswith(THRESHOLD):  # the legend says that these are thresholds
            label = each.setting.removeprefix(THRESHOLD)
        points.append(
            (label, each.speed.speedup, Interval95(label, low, 100 * score.mean, high, each.setting == chosen))
        )
    curve = [each.setting.removeprefix(THRESHOLD) for each in timed if each.setting.startswith(THRESHOLD)]
    svg = draw_trade(
        points,
        curve,
        x_label=t("answers.plot.x"),
        y_label=t("answers.plot.y", score=t(f"score.{name}")),
        full=material.setting(BASELINE),
    )
    legend = [(CURVE, t("answers.plot.thresholds")), (OTHERS, t("answers.plot.others"))]
    if chosen is not None:
        legend.insert(1, (CHOSEN, t("answers.plot.chosen")))
    return Picture(svg, t("answers.plot"), _trade_in_words(material, timed, name, chosen), legend)


def _trade_in_words(material: Material, timed: Sequence[SettingResult], score: str, chosen: str | None) -> str:
    """What the figure shows, for those who cannot see it."""
    t, by_name = material.t, {each.setting: each for each in timed}
    values = {"count": len(timed), "full": t.percent(by_name[BASELINE].scores[score].mean)}
    early = by_name.get(chosen) if chosen is not None else None
    if early is None or early.speed is None:
        return t("answers.plot.alt_plain", **values)
    quality = t.percent(early.scores[score].mean)
    setting = material.setting(early.setting)
    return t("answers.plot.alt", setting=setting, quality=quality, speed=t.times(early.speed.speedup), **values)


def _results_table(material: Material, caption: str, results: Sequence[SettingResult], chosen: str | None) -> PageTable:
    """One row per setting."""
    t = material.t
    scores = [name for name in SHOWN_SCORES if name in results[0].scores]
    columns = [
        t("column.setting"),
        t("column.speed"),
        t("column.layer"),
        *(t.heading(f"score.{name}") for name in scores),
    ]
    rows = []
    for each in results:
        cells = [Cell(material.setting(each.setting)), _speed_cell(material, each)]
        cells.append(Cell("-" if each.exit_layer is None else t.number(each.exit_layer, 1)))
        cells += [_score_cell(material, name, each.scores[name], each.setting == BASELINE) for name in scores]
        rows.append(cells)
    place = next((n for n, each in enumerate(results) if each.setting == chosen), None)
    return PageTable(caption, columns, rows, chosen=place)


def _speed_cell(material: Material, result: SettingResult) -> Cell:
    t, speed = material.t, result.speed
    if speed is None:
        return Cell("-")
    mark = "bad" if speed.speedup < 1 and result.setting != BASELINE else ""
    return Cell(t.times(speed.speedup), t("unit.per_second", value=t.number(speed.tokens_per_second, 1)), mark)


def _score_cell(material: Material, name: str, score: MeanScore, baseline: bool) -> Cell:
    """A mean with the interval of its difference to full mode, or of the share of equal answers itself."""
    t = material.t
    if baseline:
        return Cell(t.percent(score.mean))
    if name == EQUAL_ANSWERS:  # full mode's own share is 1
        return Cell(t.percent(score.mean), t("range", low=t.percent(1 + score.low), high=t.percent(1 + score.high)))
    mark = "bad" if score.high < 0 else "good" if score.low > 0 else ""
    return Cell(t.percent(score.mean), interval(material, score.difference, score.low, score.high), mark)


def interval(material: Material, value: float, low: float, high: float) -> str:
    """A difference in percentage points with its interval."""
    t = material.t
    return t("interval", value=t.points(value), low=t.points(low), high=t.points(high))


def _by_task(material: Material, tasks: TaskFile, chosen: str) -> PageTable:
    """Full mode and the chosen setting, by task."""
    t, found = material.t, tasks.content.tasks
    columns = [
        t("column.task"),
        t("column.rows"),
        t("column.full_quality"),
        t("column.early_quality"),
        t("column.speed"),
    ]
    columns.append(t.heading("score.equal_answers"))
    rows = []
    for name, results in list(found.items())[:MOST_ROWS]:
        full, early = results[BASELINE], results[chosen]
        before, after = quality_of(full), quality_of(early)
        rows.append(
            [
                Cell(printable(name), own=True),
                Cell(t.number(full.rows)),
                Cell("-" if before is None else t.percent(before[1].mean)),
                Cell("-") if after is None else _score_cell(material, *after, baseline=False),
                _speed_cell(material, early),
                Cell("-") if EQUAL_ANSWERS not in early.scores else Cell(t.percent(early.scores[EQUAL_ANSWERS].mean)),
            ]
        )
    caption = t("answers.by_task", setting=material.setting(chosen))
    if len(found) > MOST_ROWS:
        caption += t("sentence.space") + t("table.cut", shown=MOST_ROWS, count=t.number(len(found)))
    return PageTable(caption, columns, rows)


def _meanings(material: Material, tasks: TaskFile) -> FactList:
    """What the columns mean."""
    t, full = material.t, tasks.content.overall[BASELINE]
    items = [(t(f"column.{name}"), t(f"meaning.{name}"), "") for name in ("speed", "layer")]
    items += [(t.heading(f"score.{name}"), t(f"meaning.{name}"), "") for name in SHOWN_SCORES if name in full.scores]
    return FactList(items)


def _corpus_blocks(material: Material, corpus: CorpusFile) -> list[Block]:
    """Each exit alone on given text, and what a threshold saves there."""
    t, quality = material.t, corpus.quality
    blocks: list[Block] = []
    rows = [
        [Cell(t("tuned.after_layer", layer=each.layer)), Cell(t.percent(each.agreement), share=each.agreement)]
        for each in quality.exits
    ]
    if rows:
        columns = [t("tuned.column.exit"), t("corpus.agreement")]
        blocks.append(PageTable(t("corpus.exits", tokens=t.number(quality.tokens)), columns, rows))
    if quality.exits and quality.sweep:
        sweep = [
            [
                Cell(t.number(point.threshold, 2)),
                Cell(t("corpus.of_layers", value=t.number(point.mean_layers, 1), layers=quality.num_layers)),
                Cell(t.percent(point.agreement), share=point.agreement),
            ]
            for point in quality.sweep
        ]
        columns = [t("corpus.threshold"), t("corpus.layers"), t("corpus.agreement")]
        blocks += [PageTable(t("corpus.sweep"), columns, sweep), Paragraph(t("corpus.explain"), "explain")]
    if corpus.speed:
        columns = [t("column.setting"), t("column.speed"), t.heading("score.equal_tokens")]
        blocks.append(PageTable(t("corpus.speed"), columns, [_mode_row(material, each) for each in corpus.speed]))
    return blocks


def _mode_row(material: Material, mode: TimedMode) -> list[Cell]:
    t = material.t
    name = mode.mode if mode.threshold is None else f"{mode.mode} {mode.threshold:g}"
    speed = Cell(t.times(mode.speedup), t("unit.per_second", value=t.number(mode.tokens_per_second, 1)))
    return [Cell(material.setting(name)), speed, Cell(t.percent(mode.agreement))]
