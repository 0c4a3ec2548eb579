"""A ``tasks.json`` of ``evaluate --tasks`` and the answers beside it, read and checked for the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.journal import info_file
from megatron_ee.config.untrusted import parse_json, read_json, whole_lines
from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import DataError, shown
from megatron_ee.evaluation.groups.compare import WORSE, GroupComparison, GroupFigure, GroupOutcome
from megatron_ee.evaluation.tasks.results import BASELINE, SettingResult

TASKS, ANSWERS = "tasks.json", "answers.jsonl"
"""Files that ``evaluate --tasks --output`` writes."""


class Excerpt(Strict):
    """The part of a file that the page needs. The file may hold more."""

    model_config = ConfigDict(extra="ignore", strict=False)


class ComparedSetting(Excerpt):
    """A setting in ``tasks.json``.

    Attributes:
        name: unique.
        mode: ``full``, ``threshold`` or ``speculative``.
        max_tokens: largest number of tokens of an answer.
    """

    name: str
    mode: str
    max_tokens: int = Field(ge=1)


class ScoredRow(Excerpt):
    """A record in ``tasks.json``.

    Attributes:
        id, task, group: of the record.
        prompt: what was asked, and the right answers; None and empty in files of older versions.
        references: right answers.
        settings: by name, the scores and figures of its answer.
    """

    id: str
    task: str
    group: str | None = None
    prompt: str | None = None
    references: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]]


class _Block(Excerpt):
    seconds: Mapping[str, float]
    tokens: Mapping[str, int]


class _Timing(Excerpt):
    max_num_seqs: int
    rows: int
    blocks: tuple[_Block, ...] = ()


class _TasksContent(Excerpt):
    model: str
    adapter: str | None
    model_sha256: str
    adapter_sha256: str | None
    tokenizer_sha256: str | None = None
    settings: tuple[ComparedSetting, ...] = Field(min_length=1)
    overall: Mapping[str, SettingResult]
    tasks: Mapping[str, Mapping[str, SettingResult]]
    timing: _Timing
    groups: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    rows: tuple[ScoredRow, ...] = ()


class WrittenAnswer(Excerpt):
    """An answer in ``answers.jsonl``.

    Attributes:
        text: of the answer.
        layers: of each token, the layer of the exit that emitted it.
    """

    text: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class TaskFile:
    """A ``tasks.json``, and what lies beside it.

    Attributes:
        path: of the file.
        sha256: of the file.
        content: what it holds.
        groups: comparisons by the setting's name.
        answers: path of the answers; None if they are not there.
        calibration_sha256: digest of the certificate of the setting ``calibrated``, if any.
    """

    path: Path
    sha256: str
    content: _TasksContent
    groups: Mapping[str, GroupComparison]
    answers: Path | None
    calibration_sha256: str | None

    @property
    def modes(self) -> dict[str, str]:
        """Mode of each setting."""
        return {each.name: each.mode for each in self.content.settings}

    def speeds(self, setting: str) -> list[float]:
        """Speed of a setting, relative to full mode, in each part of the measurement."""
        found = []
        for block in self.content.timing.blocks:
            names = (setting, BASELINE)
            if all(block.seconds.get(name, 0) > 0 and block.tokens.get(name, 0) > 0 for name in names):
                own, full = (block.tokens[name] / block.seconds[name] for name in names)
                found.append(own / full)
        return found

    def read_answers(self, names: Iterable[str]) -> dict[tuple[str, str], WrittenAnswer]:
        """The answers in some settings, by the setting's name and the record's id.

        Raises:
            DataError: a line is not an answer.
            CheckpointError: the file cannot be read, or a line is not JSON.
        """
        wanted, found = set(names), {}
        for where, line in () if self.answers is None else whole_lines(self.answers):
            entry = parse_json(line, where)
            if isinstance(entry, dict) and "answer" in entry and entry.get("setting") in wanted:
                answer = validated(WrittenAnswer, entry["answer"], where=where, error=DataError)
                found[entry["setting"], str(entry.get("id"))] = answer
        return found


def read_task_file(path: Path, values: dict[str, Any]) -> TaskFile:
    """The content ``values`` of a ``tasks.json``, with the answers that lie beside it.

    Raises:
        DataError: it is incomplete, or was edited.
        CheckpointError: what describes the answers cannot be read, or is not JSON.
    """
    content = validated(_TasksContent, values, where=str(path), error=DataError)
    names = {each.name for each in content.settings}
    results = [content.overall, *content.tasks.values()]
    if BASELINE not in names or any(set(found) != names for found in results):
        raise DataError(
            f"{path}: overall and tasks do not have the settings {', '.join(sorted(names))}; was it edited?"
        )
    if any(set(each.scores) != set(found[BASELINE].scores) for found in results for each in found.values()):
        raise DataError(f"{path}: the settings do not have the same scores; was it edited?")
    named = {"overall": content.overall, **{f"tasks.{shown(name)}": found for name, found in content.tasks.items()}}
    for where, found in named.items():
        if found[BASELINE].speed is None and any(each.speed is not None for each in found.values()):
            raise DataError(f"{path}: {where}.{BASELINE}.speed: missing, but others have it; was it edited?")
    groups = {
        name: _read_groups(found, f"{path}: groups.{shown(name)}")
        for name, found in content.groups.items()
        if name in names
    }
    answers = path.parent / ANSWERS
    known = path.name == TASKS and answers.is_file()
    about: Any = read_json(info_file(answers)) if known and info_file(answers).is_file() else {}
    settings = about.get("settings") if isinstance(about, dict) else None
    calibration = settings.get("calibration_sha256") if isinstance(settings, dict) else None
    digest = calibration if isinstance(calibration, str) else None
    return TaskFile(path, file_sha256(path), content, groups, answers if known else None, digest)


class _GroupHead(Excerpt):
    name: str
    members: int
    largest_loss: float | None = None


class _Certified(Excerpt):
    risk: float
    delta: float


class _Comparison(Excerpt):
    by: str
    risk: str
    overall: Mapping[str, float]
    certified: _Certified | None = None
    groups: tuple[Mapping[str, Any], ...]


def _read_groups(values: Mapping[str, Any], where: str) -> GroupComparison:
    """The inverse of ``groups_dict``."""
    found = validated(_Comparison, values, where=where, error=DataError)
    groups = []
    for group in found.groups:
        head = validated(_GroupHead, group, where=where, error=DataError)
        figures = {
            name: validated(GroupFigure, group[name], where=where, error=DataError) for name in WORSE if name in group
        }
        groups.append(GroupOutcome(head.name, head.members, figures, head.largest_loss))
    if found.risk not in found.overall or found.risk not in WORSE:
        raise DataError(f"{where}: risk: {shown(found.risk)} is not among its measures")
    certified = None if found.certified is None else (found.certified.risk, found.certified.delta)
    return GroupComparison(found.by, tuple(groups), found.overall, found.risk, certified)
