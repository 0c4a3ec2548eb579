"""The end of the page: its words, and the files that it was made of."""

from __future__ import annotations

from pathlib import Path

from megatron_ee.checkpoint.adapter import DESCRIPTION
from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.journal import info_file
from megatron_ee.errors import printable
from megatron_ee.evaluation.page.blocks import Block, Cell, FactList, PageTable, Section
from megatron_ee.evaluation.page.material import Material
from megatron_ee.evaluation.page.runs import CONFIG, TunedRun
from megatron_ee.tuning.log import LOG
from megatron_ee.tuning.status import STATUS

WORDS = ("early_exit", "full", "speculative", "threshold", "exit", "token", "interval", "certificate", "agreement")
"""Words that the page explains, in their order."""


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
