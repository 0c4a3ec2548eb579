"""The beginning and the end of the page: the first figures, what to watch, the words, and the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_ee.checkpoint.adapter import DESCRIPTION
from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.journal import info_file
from megatron_ee.errors import printable
from megatron_ee.evaluation.page.answers_section import interval
from megatron_ee.evaluation.page.blocks import (
    Block,
    Card,
    Cards,
    Cell,
    FactList,
    Notices,
    PageTable,
    Paragraph,
    Section,
)
from megatron_ee.evaluation.page.groups_section import risk_sentence
from megatron_ee.evaluation.page.material import EQUAL_ANSWERS, Material, quality_of
from megatron_ee.evaluation.page.risk_section import is_full_mode, promise
from megatron_ee.evaluation.page.runs import CONFIG, TunedRun
from megatron_ee.evaluation.page.tuned import t_layers
from megatron_ee.evaluation.tasks.results import BASELINE, SettingResult
from megatron_ee.tuning.log import LOG
from megatron_ee.tuning.status import STATUS

FEW_ROWS = 100
"""Rows below which the page says that there are few."""
LITTLE = 1.05
"""Speeds below this are called hardly faster."""
UNSTEADY = 1.3
"""Ratio of the highest to the lowest speed of parts of a measurement from which the page says that it varied."""
MANY_CUT = 0.1
"""Share of answers cut at their limit that is worth a line."""
LARGE = 0.05
"""Quality that may be lost, by the interval, without being noticed."""
WORDS = ("early_exit", "full", "speculative", "threshold", "exit", "token", "interval", "certificate", "agreement")
"""Words that the page explains, in their order."""


def overview_section(material: Material) -> Section:
    """What the page is about, and the first figures."""
    t = material.t
    lead = t("overview.lead", layers=t_layers(material)) if material.num_layers else t("overview.lead_plain")
    blocks: list[Block] = [Paragraph(lead, "lead")]
    cards = [*_measured_cards(material), _promise_card(material)]
    blocks.append(Cards(cards))
    if material.chosen is not None:
        blocks.append(Paragraph(t("overview.chosen", setting=material.setting(material.chosen[0])), "note"))
    sources = [str(each.path) for each in material.measured.tasks[:1]]
    if material.certificate is not None:
        sources.append(str(material.certificate.path))
    return Section("overview", t("overview.title"), blocks, sources)


def _measured_cards(material: Material) -> Iterator[Card]:
    t = material.t
    if material.tasks is None or material.chosen is None:
        for name in ("speed", "quality", "same"):
            yield Card(t(f"card.{name}"), "-", t("card.unmeasured"))
        return
    early = material.tasks.content.overall[material.chosen[0]]
    yield _speed_card(material, early)
    yield _quality_card(material, early)
    same = early.scores.get(EQUAL_ANSWERS)
    if same is None:
        yield Card(t("card.same"), "-", t("card.unmeasured"))
    else:
        yield Card(t("card.same"), t.percent(same.mean), t("card.same_text", rows=t.number(same.rows)))


def _speed_card(material: Material, early: SettingResult) -> Card:
    t = material.t
    if early.speed is None:
        return Card(t("card.speed"), "-", t("card.untimed"))
    factor = early.speed.speedup
    key, mark = ("slower", "bad") if factor < 1 else ("hardly", "") if factor < LITTLE else ("faster", "good")
    return Card(t("card.speed"), t.times(factor), t(f"card.{key}"), mark)


def _quality_card(material: Material, early: SettingResult) -> Card:
    t = material.t
    found = quality_of(early)
    if found is None:
        return Card(t("card.quality"), "-", t("card.no_quality"))
    name, score = found
    key, mark = ("worse", "bad") if score.high < 0 else ("better", "good") if score.low > 0 else ("unclear", "")
    values = {"low": t.points(score.low), "high": t.points(score.high), "score": t(f"score.{name}")}
    return Card(t("card.quality"), t("unit.points", value=t.points(score.difference)), t(f"card.{key}", **values), mark)


def _promise_card(material: Material) -> Card:
    t, file = material.t, material.certificate
    if file is None:
        if material.absent_certificate is not None:
            return Card(t("card.promise"), "-", t("certificate.absent", digest=material.absent_certificate[:16]))
        return Card(t("card.promise"), t("card.promise_none"), t("card.promise_missing"))
    certificate = file.content
    if is_full_mode(certificate):
        return Card(t("card.promise"), t("card.promise_full"), promise(material, certificate))
    value = t("card.at_most", value=t.limit(certificate.risk))
    return Card(t("card.promise"), value, promise(material, certificate), "good")


def watch_section(material: Material) -> Section:
    """What to watch, from what the files say."""
    t = material.t
    items = list(_warnings(material)) or [("good", t("watch.nothing"))]
    items.append(("", t("watch.always")))
    return Section("watch", t("watch.title"), [Notices(items)])


def _warnings(material: Material) -> Iterator[tuple[str, str]]:
    yield from _run_warnings(material)
    yield from _answer_warnings(material)
    yield from _promise_warnings(material)


def _run_warnings(material: Material) -> Iterator[tuple[str, str]]:
    t, run = material.t, material.run
    if run is None:
        return
    if run.effort.state != "finished":
        yield "bad", t("watch.unfinished", done=t.number(run.effort.steps), planned=t.number(run.effort.planned))
    if not run.validations:
        yield "bad", t("watch.unvalidated")


def _answer_warnings(material: Material) -> Iterator[tuple[str, str]]:
    t, tasks = material.t, material.tasks
    if tasks is None:
        yield "bad", t("watch.unmeasured")
        return
    full = tasks.content.overall[BASELINE]
    if material.chosen is not None:
        yield from _early_warnings(material, tasks.content.overall[material.chosen[0]])
        yield from _speculative(material)
    if full.rows < FEW_ROWS:
        yield (
            "",
            t("watch.few", rows=t.number(full.rows), unseen=t.percent(min(1.0, 3 / full.rows)) if full.rows else "-"),
        )
    if full.cut is not None and full.cut >= MANY_CUT:
        limit = tasks.content.settings[0].max_tokens
        yield "", t("watch.cut", share=t.percent(full.cut), tokens=t.number(limit))
    for found in material.measured.tasks:
        for name, compared in found.groups.items():
            if compared.riskier and (material.chosen is None or name == material.chosen[0] or found is not tasks):
                yield "bad", risk_sentence(material, compared)


def _early_warnings(material: Material, early: SettingResult) -> Iterator[tuple[str, str]]:
    t = material.t
    if early.speed is None:
        yield "", t("watch.untimed")
    elif early.speed.speedup < 1:
        yield "bad", t("watch.slower", value=t.times(early.speed.speedup))
    elif early.speed.speedup < LITTLE:
        yield "", t("watch.hardly", value=t.times(early.speed.speedup))
    assert material.tasks is not None
    speeds = material.tasks.speeds(early.setting)
    if len(speeds) > 1 and max(speeds) > UNSTEADY * min(speeds):
        yield "", t("watch.varied", low=t.times(min(speeds)), high=t.times(max(speeds)))
    quality = quality_of(early)
    if quality is None:
        yield "", t("watch.no_quality")
    else:
        score = quality[1]
        span = interval(material, score.difference, score.low, score.high)
        if score.high < 0:
            yield "bad", t("watch.worse", interval=span)
        elif score.low < -LARGE:
            yield "", t("watch.unclear", interval=span)


def _speculative(material: Material) -> Iterator[tuple[str, str]]:
    """That speculative mode is as fast, where it is: its answers are full mode's."""
    assert material.tasks is not None and material.chosen is not None
    t, found = material.t, material.tasks.content.overall
    other, early = (found[name].speed if name in found else None for name in ("speculative", material.chosen[0]))
    if other is not None and early is not None and other.speedup >= max(early.speedup, LITTLE):
        yield "good", t("watch.speculative", value=t.times(other.speedup))


def _promise_warnings(material: Material) -> Iterator[tuple[str, str]]:
    t, file = material.t, material.certificate
    absent = material.absent_certificate
    if file is None and absent is not None:
        yield "bad", t("certificate.absent", digest=absent[:16])
    elif file is None:
        yield "", t("watch.no_certificate")
    else:
        certificate = file.content
        if is_full_mode(certificate):
            yield "bad", t("watch.full_mode")
        if certificate.says_little and not is_full_mode(certificate):
            yield "bad", t("watch.says_little", risk=t.limit(certificate.risk))
        if certificate.overlap != "none":
            yield "bad", t(f"watch.overlap.{certificate.overlap}")
        few = [name for name, group in certificate.groups.items() if group.n < group.needed]
        if few:
            yield "", t("watch.few_in_groups", names=t.joined((printable(name)[:40] for name in few), 10))
        named = None if material.tasks is None else material.tasks.calibration_sha256
        if material.tasks is not None and named is None and not is_full_mode(certificate):
            yield "", t("watch.unused_certificate")
        if absent is not None:
            yield "bad", t("watch.other_certificate", digest=absent[:16])
    for drift in material.measured.drifts:
        if drift.content.alarms:
            yield "bad", t("watch.drift", alarms=drift.content.alarms, risk=t.limit(drift.content.risk))


def words_section(material: Material) -> Section:
    """The words of the page."""
    t = material.t
    return Section("words", t("words.title"), [FactList([(t(f"word.{w}"), t(f"word.{w}.meaning"), "") for w in WORDS])])


def files_section(material: Material) -> Section:
    """Every file that the page was made of."""
    t, measured = material.t, material.measured
    beside = [] if material.run is None else _files_of_run(material.run)
    for tasks in measured.tasks:
        if tasks.answers is not None:
            beside += [(path, "files.answers") for path in (tasks.answers, info_file(tasks.answers))]
    found = [(str(path), t(key), file_sha256(path)) for path, key in dict(beside).items() if path.is_file()]
    for key, several in (
        ("tasks", measured.tasks),
        ("corpus", measured.corpora),
        ("certificate", measured.certificates),
        ("drift", measured.drifts),
        ("plan", [measured.plan] if measured.plan is not None else []),
    ):
        found += [(str(each.path), t(f"files.{key}"), each.sha256) for each in several]  # type: ignore[attr-defined]
    rows = [[Cell(printable(path), own=True), Cell(what), Cell(digest[:16])] for path, what, digest in found]
    columns = [t("files.column.file"), t("files.column.what"), t("files.column.sha256")]
    blocks: list[Block] = [PageTable(t("files.table"), columns, rows, words=(0, 1, 2))]
    return Section("files", t("files.title"), blocks)


def _files_of_run(run: TunedRun) -> list[tuple[Path, str]]:
    """The files of a run that the page reads, if they are there, and the keys of what they are."""
    weights = {Path(file) for tensor in run.adapter.weights.values() for file in tensor.files}
    corpora = [Path(f"{corpus.path}.json") for corpus in (*run.train, *run.held_out)]
    return [
        *((run.path / name, "files.tune") for name in (CONFIG, STATUS, LOG)),
        *((path, "files.exits") for path in (run.adapter.path / DESCRIPTION, *sorted(weights))),
        *((path, "files.prepared") for path in corpora),
    ]
