"""What was tuned on what, and how the exits improved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from megatron_ee.checkpoint.adapter import DESCRIPTION
from megatron_ee.errors import printable
from megatron_ee.evaluation.history import Validation
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
from megatron_ee.evaluation.page.material import Material
from megatron_ee.evaluation.page.runs import CONFIG, INITIAL, KnownCorpus, TunedRun
from megatron_ee.evaluation.page.svg import draw_agreement, exit_look
from megatron_ee.tuning.log import LOG

KNOWN = ("adapter", "adapter-best", INITIAL)
"""Names of the directories of a run's exits."""

GENERIC = ("hf", "model", "main", "base", "checkpoint", "train", "held_out", "validation")
"""Names of directories and corpora that say little without that of the directory above."""


def tuned_section(material: Material) -> Section:
    """Model, exits and data, and how the exits improved."""
    t, run = material.t, material.run
    if run is None:
        blocks: list[Block] = [
            Paragraph(t("tuned.missing"), "note"),
            CommandLine(t("tuned.how"), "megatron-ee report --run RUN_DIRECTORY ..."),
        ]
        return Section("tuned", t("tuned.title"), blocks)
    adapter, unknown = run.adapter, "tuned.own_part" if run.validations else "tuned.no_held_out"
    fingerprint = t("tuned.hash", path=printable(run.model), value=adapter.backbone_sha256[:16])
    items = [
        (t("tuned.model"), name_of(run.model), fingerprint),
        (t("tuned.exits"), _exits(material, run), t("tuned.frozen")),
        (t("tuned.data"), t.joined(map(_corpus_name, run.train)), _corpus_size(material, run.train)),
        (
            t("tuned.held_out"),
            t.joined(map(_corpus_name, run.held_out)) if run.held_out else t(unknown),
            _corpus_size(material, run.held_out),
        ),
        (
            t("tuned.kept"),
            t(f"tuned.adapter.{adapter.path.name}") if adapter.path.name in KNOWN else printable(adapter.path.name),
            t("tuned.after_step", step=t.number(adapter.steps)),
        ),
    ]
    blocks = [FactList(items)]
    sources = [str(run.path / CONFIG), str(adapter.path / DESCRIPTION)]
    if run.validations:
        blocks += _progress(material, run)
        sources.append(str(run.path / LOG))
    else:
        blocks.append(Paragraph(t("tuned.unvalidated"), "note"))
    return Section("tuned", t("tuned.title"), blocks, sources)


def name_of(path: str) -> str:
    """What people call a model or a corpus: the last part of its path, or its name in a download cache of the hub."""
    parts = PurePath(path).parts
    if hub := next((part for part in parts if part.startswith("models--")), None):
        return printable(hub.removeprefix("models--").replace("--", "/"))
    named = parts[-2:] if len(parts) > 1 and parts[-1].lower() in GENERIC else parts[-1:]
    return printable("/".join(named).removeprefix("//") or path)


def _corpus_name(corpus: KnownCorpus) -> str:
    return name_of(corpus.path)


def _corpus_size(material: Material, corpora: Sequence[KnownCorpus]) -> str:
    """How many texts and tokens the corpora have together; empty if one of them does not tell."""
    t = material.t
    documents, tokens = [each.documents for each in corpora], [each.trained_tokens or each.tokens for each in corpora]
    if not corpora or None in documents or None in tokens:
        return ""
    total = (sum(count or 0 for count in each) for each in (documents, tokens))
    return t("tuned.size", documents=t.number(next(total)), tokens=t.number(next(total)))


def _exits(material: Material, run: TunedRun) -> str:
    t, layers = material.t, t_layers(material)
    places = t.joined(t.number(spec.layer) for spec in run.adapter.exits)
    return t("tuned.exits_after", count=len(run.adapter.exits), places=places, layers=layers)


def t_layers(material: Material) -> str:
    """Number of layers of the model, or a question mark."""
    return "?" if material.num_layers is None else str(material.num_layers)


def _progress(material: Material, run: TunedRun) -> list[Block]:
    """Agreement and loss of each exit at the beginning and where the exits were kept."""
    t = material.t
    first, kept = run.validations[0], _kept(run)
    changed = kept.step != first.step
    columns = [t("tuned.column.exit"), t("tuned.column.before"), t("tuned.column.after"), t("tuned.column.loss")]
    rows = []
    for layer in sorted(kept.agreements):
        agreement, loss = kept.agreements[layer], kept.losses[layer]
        rows.append(
            [
                Cell(t("tuned.after_layer", layer=layer)),
                Cell(t.percent(first.agreements.get(layer, float("nan")))),
                Cell(t.percent(agreement), share=agreement),
                Cell(t.number(loss, 2)),
            ]
        )
    rows.append([Cell(t("setting.full", value="")), Cell(""), Cell(t.percent(1.0)), Cell(t.number(kept.final_loss, 2))])
    if not changed:  # one measurement is not a change
        columns.pop(1)
        rows = [[row[0], *row[2:]] for row in rows]
    blocks: list[Block] = [PageTable(t("tuned.table", step=t.number(kept.step)), columns, rows)]
    if len(run.validations) > 1:
        svg = draw_agreement(run.validations, x_label=t("tuned.plot.x"), y_label=t("tuned.plot.y"))
        layers = sorted(kept.agreements)
        legend = [(exit_look(n), t("tuned.after_layer", layer=layer)) for n, layer in enumerate(layers)]
        highest = max(kept.agreements, key=lambda layer: kept.agreements[layer])
        alt = t("tuned.plot.alt", layer=highest, value=t.percent(kept.agreements[highest]))
        blocks.append(Picture(svg, t("tuned.plot"), alt, legend))
    return [*blocks, Paragraph(t("tuned.explain"), "explain")]


def _kept(run: TunedRun) -> Validation:
    """The validation of the step whose exits the page is about, or the last one."""
    return next((each for each in run.validations if each.step == run.adapter.steps), run.validations[-1])
