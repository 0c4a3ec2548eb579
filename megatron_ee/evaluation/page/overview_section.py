"""The beginning of the page: the first figures."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ee.evaluation.page.blocks import Block, Card, Cards, Paragraph, Section
from megatron_ee.evaluation.page.material import EQUAL_ANSWERS, Material, quality_of
from megatron_ee.evaluation.page.risk_section import is_full_mode, promise
from megatron_ee.evaluation.page.tuned_section import t_layers
from megatron_ee.evaluation.tasks.results import SettingResult

LITTLE = 1.05
"""Speeds below this are called hardly faster."""


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
