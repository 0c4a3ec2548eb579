"""At which layers the tokens were emitted."""

from __future__ import annotations

from collections import Counter

from megatron_ee.evaluation.page.blocks import Cell, PageTable, Paragraph, Section
from megatron_ee.evaluation.page.material import Material


def layers_section(material: Material) -> Section | None:
    """At which layers the tokens of the chosen setting were emitted; None without answers."""
    t, tasks = material.t, material.tasks
    if tasks is None or material.chosen is None:
        return None
    chosen = material.chosen[0]
    counts = Counter(
        layer for (name, _), answer in material.answers.items() if name == chosen for layer in answer.layers
    )
    total = sum(counts.values())
    if not total:
        return None
    last = material.num_layers
    rows = [
        [
            Cell(t("layers.final", layer=layer) if layer == last else t("tuned.after_layer", layer=layer)),
            Cell(t.number(count)),
            Cell(t.percent(count / total), share=count / total),
        ]
        for layer, count in sorted(counts.items())
    ]
    columns = [t("layers.column.layer"), t("layers.column.tokens"), t("layers.column.share")]
    blocks = [PageTable(t("layers.table", setting=material.setting(chosen)), columns, rows)]
    return Section(
        "layers", t("layers.title"), [*blocks, Paragraph(t("layers.explain"), "explain")], [str(tasks.answers)]
    )
