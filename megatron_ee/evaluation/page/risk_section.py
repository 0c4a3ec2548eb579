"""What is promised: the certificates of ``calibrate``, and whether the promise is still kept."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ee.errors import printable
from megatron_ee.evaluation.calibration.candidates import level_decimals
from megatron_ee.evaluation.calibration.sample import ALL
from megatron_ee.evaluation.page.answers_section import MOST_ROWS
from megatron_ee.evaluation.page.blocks import (
    Block,
    Cell,
    CommandLine,
    FactList,
    Notices,
    PageTable,
    Paragraph,
    Picture,
    Section,
)
from megatron_ee.evaluation.page.material import Material
from megatron_ee.evaluation.page.sources import CertificateFile, DriftFile
from megatron_ee.evaluation.page.svg import FAILED, LIMIT, PASSED, draw_tests
from megatron_ee.inference.certificate import Certificate, Tested


def certificates_section(material: Material) -> Section:
    """The promise of each certificate, what was tested for it, and what it does not promise."""
    t, found = material.t, material.measured.certificates
    if not found:
        words = ("--data", "questions.jsonl", "--risk", "0.05", "--delta", "0.1", "--output", "certificate.json")
        absent = material.absent_certificate
        blocks: list[Block] = [
            Paragraph(t("certificate.missing"), "note"),
            CommandLine(t("certificate.how"), material.command("calibrate", *words)),
        ]
        if absent is not None:
            blocks = [Paragraph(t("certificate.absent", digest=absent[:16]), "note")]
        return Section("certificate", t("certificate.title"), blocks)
    blocks = [block for number, each in enumerate(found, 1) for block in _certificate_blocks(material, each, number)]
    if any(each.content.tested for each in found):
        blocks.append(Paragraph(t("explain.level"), "explain"))
    blocks.append(Notices([("", t(f"certificate.not.{key}")) for key in ("single", "right", "others", "change")]))
    return Section("certificate", t("certificate.title"), blocks, [str(each.path) for each in found])


def promise(material: Material, certificate: Certificate) -> str:
    """What a certificate promises, in a sentence."""
    t = material.t
    values = {
        "risk": t.limit(certificate.risk),
        "confidence": t.limit(1 - certificate.delta).removesuffix("%"),
        "metric": t(f"score.{certificate.metric}") if certificate.metric else "",
    }
    if is_full_mode(certificate):
        return t("certificate.none", **values)
    groups = {"no": "", "worst": t("certificate.worst_group"), "own": t("certificate.own_groups")}
    return t(f"certificate.promise.{certificate.loss}", **values) + groups[certificate.per_group]


def is_full_mode(certificate: Certificate) -> bool:
    """Whether no setting of the exits was safe enough for anybody."""
    return certificate.policy is None and all(each.policy is None for each in certificate.groups.values())


def _certificate_blocks(material: Material, file: CertificateFile, number: int) -> list[Block]:
    t, certificate = material.t, file.content
    decoding = certificate.decoding
    items = [
        (
            t("certificate.task"),
            printable(certificate.task)[:200],
            t("certificate.date", date=t.date(certificate.date)),
        ),
        (
            t("certificate.sample"),
            t("certificate.questions", count=t.number(certificate.n)),
            t("certificate.sample_more", fit=t.number(certificate.n_fit)),
        ),
    ]
    if certificate.loss_interval is not None:
        loss = certificate.loss_interval
        bound = t("certificate.bound", value=t.percent(loss.high))
        items.append((t("certificate.loss"), t.percent(loss.mean), bound))
    metric = t(f"score.{certificate.metric}") if certificate.metric else ""
    items.append((t("certificate.what_loss"), t(f"certificate.is_loss.{certificate.loss}", metric=metric), ""))
    if certificate.full_quality is not None:
        items.append((t("certificate.full_quality", metric=metric), t.percent(certificate.full_quality), ""))
    if certificate.mean_exit_layer is not None:
        layer = certificate.mean_exit_layer
        low, high = (t.number(end if end is not None else layer.mean, 1) for end in (layer.low, layer.high))
        mean = t("corpus.of_layers", value=t.number(layer.mean, 1), layers=certificate.full_layers)
        items.append((t("certificate.layer"), mean, t("range.95", low=low, high=high)))
    stop = t("certificate.with_stop", count=len(decoding.stop)) if decoding.stop else ""
    items.append((t("certificate.covers"), t("certificate.covers_more", tokens=t.number(decoding.max_tokens)), stop))
    items.append((t("certificate.overlap"), t(f"certificate.overlap.{certificate.overlap}"), ""))
    blocks: list[Block] = [Paragraph(promise(material, certificate), "verdict"), FactList(items)]
    for place, (scope, tests) in enumerate(list(certificate.tested.items())[:MOST_ROWS]):
        if tests:
            blocks += _tests(material, certificate, scope, tests, f"tests-{number}-{place}")
    if len(certificate.tested) > MOST_ROWS:
        blocks.append(Paragraph(t("table.cut", shown=MOST_ROWS, count=t.number(len(certificate.tested))), "note"))
    if certificate.groups:
        blocks.append(_groups(material, certificate))
    if not is_full_mode(certificate):
        most = t.limit(certificate.delta).removesuffix("%")
        blocks.append(Paragraph(t("explain.certificate", most=most), "explain"))
    return blocks


def _tests(material: Material, certificate: Certificate, scope: str, tests: Sequence[Tested], name: str) -> list[Block]:
    t, rows = material.t, []
    for each in tests:
        layer = "-" if each.mean_exit_layer is None else t.number(each.mean_exit_layer, 1)
        result = Cell(t("certificate.passed")) if each.passed else Cell(t("certificate.failed"), mark="bad")
        level = f"{t.number(100 * each.level, level_decimals(each.level) - 2)}%"
        rows.append([Cell(level), Cell(layer), Cell(t.percent(each.loss)), result])
    columns = [t(f"certificate.column.{key}") for key in ("level", "layer", "loss", "result")]
    caption = t("certificate.tests")
    if certificate.per_group == "worst":
        caption += t("sentence.space") + t("certificate.in_every_group")
    if scope != ALL:
        caption += t("sentence.space") + t("certificate.of_group", name=printable(scope)[:80])
    chosen = certificate.chosen_test(scope)
    table = PageTable(caption, columns, rows, words=(0, 3), chosen=chosen)
    drawn = [(each.mean_exit_layer, 100 * each.loss, each.passed) for each in tests if each.mean_exit_layer is not None]
    if len(drawn) < 2 or len(drawn) < len(tests):
        return [table]
    svg = draw_tests(
        name, drawn, 100 * certificate.risk, chosen, x_label=t("certificate.plot.x"), y_label=t("certificate.plot.y")
    )
    passed = sum(each.passed for each in tests)
    alt = t("certificate.plot.alt", passed=passed, count=len(tests), risk=t.limit(certificate.risk))
    legend = [(PASSED, t("certificate.passed")), (LIMIT, t("certificate.plot.risk"))]
    if passed < len(tests):
        legend.insert(1, (FAILED, t("certificate.failed")))
    return [Picture(svg, t("certificate.plot"), alt, legend), table]


def _groups(material: Material, certificate: Certificate) -> PageTable:
    t, rows = material.t, []
    for name, group in list(certificate.groups.items())[:MOST_ROWS]:
        if certificate.per_group == "own":
            result = Cell(t("certificate.group.full" if group.policy is None else "certificate.group.own"))
        else:
            result = Cell(t("certificate.group.few") if group.n < group.needed else "")
        loss = group.loss
        rows.append(
            [
                Cell(printable(name)[:80], own=True),
                Cell(t.number(group.n)),
                Cell("-" if loss is None else t.percent(loss.mean)),
                Cell("-" if loss is None else t.percent(loss.high)),
                result,
            ]
        )
    columns = [t("column.group"), t("column.rows"), t("measure.loss"), t("groups.bound"), t("certificate.column.note")]
    caption = t("certificate.groups")
    if len(certificate.groups) > MOST_ROWS:
        caption += t("sentence.space") + t("table.cut", shown=MOST_ROWS, count=t.number(len(certificate.groups)))
    return PageTable(caption, columns, rows, words=(0, 4))


def drift_section(material: Material) -> Section | None:
    """Whether audited requests still keep the promise; None if nothing can be said of it."""
    t, found = material.t, material.measured.drifts
    if not found and not material.measured.certificates:
        return None
    if not found:
        certificate = material.measured.certificates[0].path
        command = f"megatron-ee drift exits.jsonl --calibration {printable(str(certificate))} --json > drift.json"
        blocks: list[Block] = [Paragraph(t("drift.missing"), "note"), CommandLine(t("drift.how"), command)]
        return Section("drift", t("drift.title"), blocks)
    blocks = [block for each in found for block in _drift_blocks(material, each)]
    return Section("drift", t("drift.title"), blocks, [str(each.path) for each in found])


def _drift_blocks(material: Material, file: DriftFile) -> list[Block]:
    t, drift = material.t, file.content
    key = "none" if not drift.audits else "alarm" if drift.alarms else "quiet"
    values = {"audits": t.number(drift.audits), "alarms": drift.alarms, "risk": t.limit(drift.risk)}
    items = [(t("drift.audits"), t.number(drift.audits), t("drift.uncounted", count=t.number(drift.uncounted)))]
    if drift.mean_loss is not None:
        recent = drift.recent_mean_loss
        of_recent = "" if recent is None else t("drift.recent", value=t.percent(recent))
        items.append((t("drift.loss"), t.percent(drift.mean_loss), of_recent))
    items.append((t("drift.allowed"), t.limit(drift.risk), ""))
    explained = Paragraph(t("explain.drift", level=t.limit(drift.alarm_level)), "explain")
    return [Paragraph(t(f"drift.{key}", **values), "verdict"), FactList(items), explained]
