"""What to watch, from what the files say."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ee.errors import printable
from megatron_ee.evaluation.page.answers_section import interval
from megatron_ee.evaluation.page.blocks import Notices, Section
from megatron_ee.evaluation.page.groups_section import risk_sentence
from megatron_ee.evaluation.page.material import Material, quality_of
from megatron_ee.evaluation.page.overview_section import LITTLE
from megatron_ee.evaluation.page.risk_section import is_full_mode
from megatron_ee.evaluation.tasks.results import BASELINE, SettingResult

FEW_ROWS = 100
"""Rows below which the page says that there are few."""
UNSTEADY = 1.3
"""Ratio of the highest to the lowest speed of parts of a measurement from which the page says that it varied."""
MANY_CUT = 0.1
"""Share of answers cut at their limit that is worth a line."""
LARGE = 0.05
"""Quality that may be lost, by the interval, without being noticed."""


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
