"""What other commands left on disk, read and checked: the material of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.config.untrusted import read_json
from megatron_ee.config.validation import validated
from megatron_ee.errors import ConfigError, DataError, UserError
from megatron_ee.evaluation.page.task_file import ANSWERS, TASKS, Excerpt, TaskFile, read_task_file
from megatron_ee.inference.certificate import Certificate, read_certificate
from megatron_ee.model.quality import Quality

CORPUS = "evaluation.json"
"""File that ``evaluate --data --output`` writes."""


class TimedMode(Excerpt):
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
    model_sha256: str | None
    adapter_sha256: str | None


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


class _FromStart(Excerpt):
    alarm: Mapping[str, Any] | None = None


class _Restarting(Excerpt):
    alarms: tuple[Mapping[str, Any], ...] = ()


class DriftFigures(Excerpt):
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
    from_start: _FromStart
    restarting: _Restarting
    certificates: tuple[str, ...] = ()

    @property
    def alarms(self) -> int:
        """Alarms of both tests."""
        return len(self.restarting.alarms) + (self.from_start.alarm is not None)


@dataclass(frozen=True)
class DriftFile:
    """A saved output of ``drift --json``; see ``DriftFigures``."""

    path: Path
    sha256: str
    content: DriftFigures


class _PlanDevice(Excerpt):
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
    def adapter_sha256(self) -> str | None:
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
                tasks.append(read_task_file(file, content))
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


def _read_corpus(path: Path, content: dict[str, Any]) -> CorpusFile:
    try:
        values = asdict(Quality.from_dict(content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is not a result of megatron-ee evaluate --data: {error!r}") from None
    quality = validated(Quality, values, where=str(path), error=DataError)  # from_dict takes figures of any type
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


def check_one_model(owners: Sequence[tuple[str, Mapping[str, str | None]]]) -> None:
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
