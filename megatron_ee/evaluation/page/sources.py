"""What other commands left on disk, read and checked: the material of the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.journal import info_file
from megatron_ee.config.untrusted import MAX_FILE, open_regular, parse_json, read_json
from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import ConfigError, DataError, UserError, shown
from megatron_ee.evaluation.groups import WORSE, GroupComparison, GroupFigure, GroupOutcome
from megatron_ee.evaluation.tasks.results import BASELINE, SettingResult
from megatron_ee.inference.certificate import Certificate, read_certificate
from megatron_ee.model.quality import Quality

TASKS, CORPUS, ANSWERS = "tasks.json", "evaluation.json", "answers.jsonl"
"""Files that ``evaluate --output`` writes."""
Sha256 = str | None


class _Ignoring(Strict):
    """The part of a file that the page needs. It may hold more."""

    model_config = ConfigDict(extra="ignore", strict=False)


class ComparedSetting(_Ignoring):
    """A setting in ``tasks.json``.

    Attributes:
        name: unique.
        mode: ``full``, ``threshold`` or ``speculative``.
        max_tokens: largest number of tokens of an answer.
    """

    name: str
    mode: str
    max_tokens: int = Field(ge=1)


class ScoredRow(_Ignoring):
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


class _Block(_Ignoring):
    seconds: Mapping[str, float]
    tokens: Mapping[str, int]


class _Timing(_Ignoring):
    max_num_seqs: int
    rows: int
    blocks: tuple[_Block, ...] = ()


class _TasksContent(_Ignoring):
    model: str
    adapter: str | None
    model_sha256: str
    adapter_sha256: Sha256
    tokenizer_sha256: Sha256 = None
    settings: tuple[ComparedSetting, ...] = Field(min_length=1)
    overall: Mapping[str, SettingResult]
    tasks: Mapping[str, Mapping[str, SettingResult]]
    timing: _Timing
    groups: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    rows: tuple[ScoredRow, ...] = ()


class WrittenAnswer(_Ignoring):
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
    calibration_sha256: Sha256

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
            DataError: the file cannot be read, or has an invalid line.
        """
        wanted, found = set(names), {}
        for where, line in () if self.answers is None else _lines(self.answers):
            entry = parse_json(line, where)
            if isinstance(entry, dict) and "answer" in entry and entry.get("setting") in wanted:
                answer = validated(WrittenAnswer, entry["answer"], where=where, error=DataError)
                found[entry["setting"], str(entry.get("id"))] = answer
        return found


class TimedMode(_Ignoring):
    """An entry of ``speed`` in ``evaluation.json``; see ``ModeSpeed``."""

    mode: str
    threshold: float | None = None
    tokens_per_second: float
    speedup: float
    agreement: float


@dataclass(frozen=True)
class CorpusFile:
    """An ``evaluation.json`` of ``evaluate --data``.

    Attributes:
        path: of the file.
        sha256: of the file.
        quality: per exit and threshold.
        speed: of each mode, from ``--speed``.
        model_sha256: None in files of older versions.
        adapter_sha256: likewise.
    """

    path: Path
    sha256: str
    quality: Quality
    speed: tuple[TimedMode, ...]
    model_sha256: Sha256
    adapter_sha256: Sha256


@dataclass(frozen=True)
class CertificateFile:
    """A certificate of ``calibrate``.

    Attributes:
        path: of the file.
        sha256: of the file, which names the certificate elsewhere.
        content: what it holds.
    """

    path: Path
    sha256: str
    content: Certificate


class DriftFigures(_Ignoring):
    """The output of ``drift --json``.

    Attributes:
        risk: that was tested.
        alarm_level: of the tests.
        audits: audited requests that counted.
        uncounted: audited requests that did not.
        mean_loss: of all that counted.
        recent_mean_loss: of the last of them.
        from_start: result of the test from the start.
        restarting: of the restarting test.
        certificates: digests of the certificates; empty in files of older versions.
    """

    risk: float
    alarm_level: float
    audits: int
    uncounted: int
    mean_loss: float | None
    recent_mean_loss: float | None
    from_start: Mapping[str, Any]
    restarting: Mapping[str, Any]
    certificates: tuple[str, ...] = ()

    @property
    def alarms(self) -> int:
        """Alarms of both tests."""
        return len(self.restarting.get("alarms") or ()) + (self.from_start.get("alarm") is not None)


@dataclass(frozen=True)
class DriftFile:
    """A saved output of ``drift --json``; see ``DriftFigures``."""

    path: Path
    sha256: str
    content: DriftFigures


class _PlanDevice(_Ignoring):
    gpus: int
    gpu: str | None = None
    seconds: float | None = None
    kilowatt_hours: float | None = None
    price: float | None = None


@dataclass(frozen=True)
class PlanFile:
    """A saved output of ``plan --json``: time, energy and price as they were planned."""

    path: Path
    sha256: str
    content: _PlanDevice


@dataclass(frozen=True)
class Measurements:
    """What was measured of the exits of one model.

    Attributes:
        tasks: of ``evaluate --tasks``.
        corpora: of ``evaluate --data``.
        certificates: of ``calibrate``.
        drifts: of ``drift --json``.
        plan: of ``plan --json``.
    """

    tasks: list[TaskFile] = field(default_factory=list)
    corpora: list[CorpusFile] = field(default_factory=list)
    certificates: list[CertificateFile] = field(default_factory=list)
    drifts: list[DriftFile] = field(default_factory=list)
    plan: PlanFile | None = None

    @property
    def adapter_sha256(self) -> Sha256:
        """Digest of the exits that were measured, from the first file that tells."""
        digests = [
            *(each.content.adapter_sha256 for each in self.tasks),
            *(each.content.adapter_sha256 for each in self.certificates),
            *(each.adapter_sha256 for each in self.corpora),
        ]
        return next((digest for digest in digests if digest is not None), None)


def read_evaluations(paths: Sequence[Path]) -> tuple[list[TaskFile], list[CorpusFile]]:
    """Results of ``evaluate``: files, or directories of ``--output``. Their content tells what they are.

    Raises:
        ConfigError: a path holds no result.
        DataError: a file is not one, or is incomplete.
        CheckpointError: it cannot be read, or is not JSON.
    """
    tasks, corpora = [], []
    for path in paths:
        for file in _files(path):
            content = read_json(file)
            if not isinstance(content, dict):
                raise DataError(f"{file}: is not a result of megatron-ee evaluate")
            if "overall" in content and "settings" in content:
                tasks.append(_read_tasks(file, content))
            elif "final_loss" in content and "sweep" in content:
                corpora.append(_read_corpus(file, content))
            else:
                raise DataError(
                    f"{file}: is not a result of megatron-ee evaluate; give {TASKS} or {CORPUS}, or the directory of "
                    "evaluate --output"
                )
    return tasks, corpora


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [path / name for name in (TASKS, CORPUS) if (path / name).is_file()]
    if not found:
        unfinished = (path / ANSWERS).exists()
        hint = "is unfinished; end it with evaluate --resume" if unfinished else f"holds neither {TASKS} nor {CORPUS}"
        raise ConfigError(f"--evaluation: {path} {hint}")
    return found


def _read_tasks(path: Path, values: dict[str, Any]) -> TaskFile:
    content = validated(_TasksContent, values, where=str(path), error=DataError)
    names = {each.name for each in content.settings}
    results = [content.overall, *content.tasks.values()]
    if BASELINE not in names or any(set(found) != names for found in results):
        raise DataError(
            f"{path}: overall and tasks do not have the settings {', '.join(sorted(names))}; was it edited?"
        )
    if any(set(each.scores) != set(found[BASELINE].scores) for found in results for each in found.values()):
        raise DataError(f"{path}: the settings do not have the same scores; was it edited?")
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


class _GroupHead(_Ignoring):
    name: str
    members: int
    largest_loss: float | None = None


class _Certified(_Ignoring):
    risk: float
    delta: float


class _Comparison(_Ignoring):
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


def _read_corpus(path: Path, content: dict[str, Any]) -> CorpusFile:
    try:
        quality = Quality.from_dict(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is not a result of megatron-ee evaluate --data: {error!r}") from None
    modes = validated(tuple[TimedMode, ...], content.get("speed", []), where=f"{path}: speed", error=DataError)
    digests = [content.get(name) for name in ("model_sha256", "adapter_sha256")]
    model, adapter = (digest if isinstance(digest, str) else None for digest in digests)
    return CorpusFile(path, file_sha256(path), quality, modes, model, adapter)


def read_certificates(paths: Sequence[Path]) -> list[CertificateFile]:
    """Certificates of ``calibrate``. Raises ``DataError`` as ``read_certificate`` does."""
    return [CertificateFile(path, file_sha256(path), read_certificate(path)) for path in paths]


def read_drifts(paths: Sequence[Path]) -> list[DriftFile]:
    """Saved outputs of ``drift --json``.

    Raises:
        DataError: a file is something else.
        CheckpointError: it cannot be read, or is not JSON.
    """
    made_by = "is not the output of megatron-ee drift --json"
    return [DriftFile(path, file_sha256(path), _content(path, DriftFigures, made_by)) for path in paths]


def read_plan(path: Path) -> PlanFile:
    """A saved output of ``plan --json``. Errors as for ``read_drifts``."""
    return PlanFile(
        path, file_sha256(path), _content(path, _PlanDevice, "is not the output of megatron-ee plan --json")
    )


def _content(path: Path, kind: Any, otherwise: str) -> Any:
    content = read_json(path)
    try:
        return validated(kind, content, where=str(path), error=DataError)
    except UserError as error:
        raise DataError(f"{path}: {otherwise}: {str(error).removeprefix(f'{path}: ')}") from None


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The whole lines of a file of JSON lines with file and line, of bounded size; blank ones are left out."""
    with open_regular(path) as fd, open(fd, "rb", closefd=False) as file:
        number = 0
        while line := file.readline(MAX_FILE):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) >= MAX_FILE:
                    raise DataError(f"{path}:{number}: a line of more than {MAX_FILE} bytes")
                return  # torn by a kill
            if line.strip():
                yield f"{path}:{number}", line


def check_one_model(owners: Sequence[tuple[str, Mapping[str, Sha256]]]) -> None:
    """Refuse files about different models, exits or tokenizers.

    Args:
        owners: name of each file, and its digests by ``model_sha256``, ``adapter_sha256`` and ``tokenizer_sha256``;
            None or missing where it does not record them.

    Raises:
        DataError: naming the two files.
    """
    words = {
        "model_sha256": "another model",
        "adapter_sha256": "other exits",
        "tokenizer_sha256": "another tokenizer or chat template",
    }
    for key, what in words.items():
        first: tuple[str, str] | None = None
        for name, digests in owners:
            digest = digests.get(key)
            if digest is None:
                continue
            if first is not None and first[1] != digest:
                raise DataError(
                    f"{name}: {key}: is about {what} ({digest[:16]}...) than {first[0]} ({first[1][:16]}...); "
                    "make one report of each"
                )
            first = first or (name, digest)


def json_object(path: Path, limit: int = 2**20) -> dict[str, Any]:
    """The JSON object of a small file.

    Raises:
        DataError: it is no object.
        CheckpointError: it cannot be read, or is not JSON.
    """
    content = read_json(path, limit)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, not {shown(json.dumps(content)[:80])}")
    return content
