"""What a run of ``tune`` left in its directory: what was tuned on what, how it went, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.adapter import Adapter, open_adapter
from megatron_ee.checkpoint.ownership import MARKER
from megatron_ee.config.untrusted import read_json
from megatron_ee.errors import ConfigError, DataError, UserError, shown
from megatron_ee.evaluation.history import Validation, read_lines, read_validations
from megatron_ee.inference.released import exits_digest
from megatron_ee.tuning.finish import LAST
from megatron_ee.tuning.log import LOG
from megatron_ee.tuning.status import STATUS
from megatron_ee.tuning.trainer import BEST

CONFIG = "config.json"
INITIAL = "adapter-initial"
MAX_DESCRIPTION = 2**20
"""Bytes of a run's or a corpus's description."""


@dataclass(frozen=True)
class KnownCorpus:
    """A corpus that exits were tuned on.

    Attributes:
        path: its prefix.
        documents, tokens, trained_tokens: of the corpus, from its description; None where that is gone.
    """

    path: str
    documents: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None


@dataclass(frozen=True)
class Effort:
    """What a run took.

    Attributes:
        steps: done.
        planned: of the configuration.
        state: of ``status.json``.
        tokens: that the exits were trained on; None if the log does not tell.
        seconds: of all sessions of the run that ended by themselves; None if none is logged.
        processes: of the last session.
        device: of the last session.
        step_seconds: of the steps that are logged; None if there are none.
        logged_steps: number of these.
    """

    steps: int
    planned: int
    state: str
    tokens: int | None
    seconds: float | None
    processes: int | None
    device: str | None
    step_seconds: float | None
    logged_steps: int


@dataclass(frozen=True)
class TunedRun:
    """A run's directory.

    Attributes:
        path: of the directory.
        adapter: the exits of this run that the page is about.
        adapter_sha256: their digest, as ``evaluate`` records it.
        settings: of ``config.json``.
        train, held_out: corpora.
        validations: in the order of steps; empty without validation data.
        effort: what it took.
        weights_bytes: size of the exits on disk.
    """

    path: Path
    adapter: Adapter
    adapter_sha256: str
    settings: Mapping[str, Any]
    train: tuple[KnownCorpus, ...]
    held_out: tuple[KnownCorpus, ...]
    validations: tuple[Validation, ...]
    effort: Effort
    weights_bytes: int

    @property
    def digests(self) -> dict[str, str | None]:
        """For ``check_one_model``."""
        return {"model_sha256": self.adapter.backbone_sha256, "adapter_sha256": self.adapter_sha256}

    @property
    def model(self) -> str:
        """Path of the model."""
        return self.adapter.base_model


def run_directory(path: Path) -> tuple[Path, Path | None]:
    """The run's directory, and that of its evaluation if ``path`` is a quickstart's, which has both.

    Raises:
        ConfigError: it is neither.
    """
    if (path / CONFIG).is_file() and (path / STATUS).is_file():
        return path, None
    tuning, evaluation = path / "tuning", path / "evaluation"
    if (path / MARKER).is_file() and (tuning / CONFIG).is_file():
        return tuning, evaluation if evaluation.is_dir() else None
    raise ConfigError(f"--run: {path} is not a run's directory; give what was --output of tune")


def read_run(path: Path, adapter_sha256: str | None = None) -> TunedRun:
    """Read a run's directory.

    Args:
        path: the directory.
        adapter_sha256: digest of the exits that were measured; None if nothing was.

    Raises:
        ConfigError: it has no adapter yet.
        DataError: the measured exits are none of this run, or a file is invalid.
        CheckpointError: a file cannot be read.
    """
    settings, status = _json_object(path / CONFIG), _json_object(path / STATUS)
    adapter, digest = _chosen_adapter(path, adapter_sha256)
    try:
        tuning, data = settings["tuning"], settings["data"]
        planned, prefixes = int(tuning["steps"]), (data["train"], data["validation"])
        train, held_out = (tuple(_corpus(each) for each in found) for found in prefixes)
        state, done = str(status["state"]), int(status["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: {CONFIG} and {STATUS} are not those of a run of tune: {error!r}") from None
    log = path / LOG
    validations = tuple(read_validations(log)) if log.is_file() else ()
    effort = _effort(log, done, planned, state, validations)
    files = {file for tensor in adapter.weights.values() for file in tensor.files}
    size = sum(Path(file).stat().st_size for file in files)
    return TunedRun(path, adapter, digest, settings, train, held_out, validations, effort, size)


def _chosen_adapter(path: Path, measured: str | None) -> tuple[Adapter, str]:
    """The run's exits that were measured, or else the best ones."""
    places = [place for place in (path / BEST, path / LAST, path / INITIAL) if place.exists()]
    if not places:
        raise ConfigError(f"--run: {path} holds no exits yet; wait for the first checkpoint, or continue with --resume")
    for place in places:
        adapter = open_adapter(place, verify=False)
        digest = exits_digest(adapter)
        if measured is None or digest == measured:
            return adapter, digest
    names = ", ".join(place.name for place in places)
    raise DataError(
        f"--run: {path}: the exits that were measured ({measured[:16] if measured else ''}...) are none of its own "
        f"({names}); measure these again, or give the run of those"
    )


def _corpus(entry: Any) -> KnownCorpus:
    """A corpus of the configuration, with its size if its description is still there."""
    prefix = entry if isinstance(entry, str) else entry["path"]
    try:
        found = _json_object(Path(f"{prefix}.json"))
    except UserError:
        found = {}
    counts = [found.get(name) for name in ("documents", "tokens", "trained_tokens")]
    return KnownCorpus(str(prefix), *(count if isinstance(count, int) else None for count in counts))


def _effort(log: Path, done: int, planned: int, state: str, validations: Sequence[Validation]) -> Effort:
    seconds: float | None = None
    processes: int | None = None
    device: str | None = None
    steps: dict[int, tuple[int, float]] = {}
    for line in read_lines(log) if log.is_file() else ():
        if line.session is not None:
            seconds = (seconds or 0.0) + line.session.seconds
            processes, device = line.session.processes, line.session.device
        elif line.tokens is not None and line.tokens_per_second:
            steps[line.step] = line.tokens, line.tokens / line.tokens_per_second
    tokens = max((each.tokens_seen for each in validations), default=0)
    logged = sum(count for count, _ in steps.values())
    return Effort(
        steps=done,
        planned=planned,
        state=state,
        tokens=max(tokens, logged) or None,
        seconds=seconds,
        processes=processes,
        device=device,
        step_seconds=sum(time for _, time in steps.values()) if steps else None,
        logged_steps=len(steps),
    )


def _json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a small file."""
    content = read_json(path, MAX_DESCRIPTION)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, not {shown(json.dumps(content)[:80])}")
    return content
