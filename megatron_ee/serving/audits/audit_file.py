"""The state of a server's audits in a small file, which a restart does not change. So a fallback survives it, too."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from megatron_ee.checkpoint.atomic import write_json
from megatron_ee.config.untrusted import read_json
from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import CheckpointError, ConfigError, DataError, storage_errors
from megatron_ee.evaluation.drift.monitor import ALARM_LEVEL, DriftMonitor, new_monitor
from megatron_ee.inference.certificate import Calibration, Sha256
from megatron_ee.serving.exit_log import beside

VERSION: Final = 1
MAX_BYTES = 2**22
Count = Annotated[int, Field(ge=0)]


class Alarm(Strict):
    """An alarm of the test from the start.

    Attributes:
        time: ISO 8601 in UTC.
        number: of the request whose audit raised it.
    """

    time: str
    number: Count


class CertificateAudits(Strict):
    """The audits of one certificate.

    Attributes:
        task: of the certificate.
        monitors: the tests as certified, and then after each alarm. Each is a test of its own, since another setting
            runs then.
        alarms: one less than the monitors.
        failed: audits without an answer, which counted as a loss of 1.
        unfinished: audits that the end of a server cut off.
    """

    task: str
    monitors: Annotated[tuple[DriftMonitor, ...], Field(strict=False, min_length=1)]
    alarms: Annotated[tuple[Alarm, ...], Field(strict=False)] = ()
    failed: Count = 0
    unfinished: Count = 0

    def updated(self, loss: float, alarms: int, number: int, time: str) -> CertificateAudits:
        """The state after one more audit.

        Args:
            loss: of the answer.
            alarms: that there had been when the request was admitted, which says what setting it ran with.
            number: of the request.
            time: ISO 8601 in UTC.
        """
        monitors = list(self.monitors)
        monitors[alarms] = monitors[alarms].updated(loss)
        raised = self.alarms
        if alarms == len(raised) and monitors[alarms].alarm is not None:
            raised = (*raised, Alarm(time=time, number=number))
            monitors.append(new_monitor(monitors[alarms].risk, monitors[alarms].alarm_level))
        return self.model_copy(update={"monitors": tuple(monitors), "alarms": raised})


class AuditFile(Strict):
    """The content of the file.

    Attributes:
        version: of the format.
        seed: of the draw. Nobody else knows it, so no client can tell which of its requests are audited.
        certificates: by the SHA-256 of the certificate's file.
    """

    version: Literal[1] = VERSION
    seed: int
    certificates: Mapping[Sha256, CertificateAudits] = Field(default_factory=dict)


def read_audit_file(path: Path) -> AuditFile | None:
    """Read a file; None if there is none.

    Raises:
        DataError: it is damaged. A fallback must not be lost silently.
    """
    if not path.exists():
        return None
    try:
        values: Any = read_json(path, MAX_BYTES)
        return validated(AuditFile, values, where=str(path), error=DataError)
    except (CheckpointError, DataError) as error:
        raise DataError(f"{error}; to begin all tests again, and to end any fallback, remove the file") from None


def write_audit_file(path: Path, content: AuditFile) -> None:
    """Write a file, in one step.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_json(path, content.model_dump(mode="json"))


def state_path(exit_log: Path) -> Path:
    """Where the state is kept, beside the exit log."""
    return beside(exit_log, "audits.json")


def adopt_old_state(exit_log: Path) -> None:
    """Rename the state of an earlier version. Its name began with the log's, so patterns that name logs matched it.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    old, path = exit_log.with_name(f"{exit_log.name}.audits.json"), state_path(exit_log)
    if old.exists() and not path.exists():
        with storage_errors(old, "rename"):
            os.rename(old, path)


def can_audit(calibration: Calibration) -> bool:
    """Whether audits can tell a certificate's loss."""
    return calibration.certificate.loss != "quality"


def begin_audits(
    path: Path,
    calibrations: Sequence[Calibration],
    share: float,
    *,
    alarm_level: float = ALARM_LEVEL,
    reset: bool = False,
) -> AuditFile:
    """The state with which an ``Auditor`` begins. Changes nothing on disk.

    Args:
        path: of the state of earlier audits, if there were any.
        calibrations: the certificates.
        share: of the requests to audit, in [0, 1].
        alarm_level: of the tests.
        reset: begin the tests of these certificates again, and end their fallbacks.

    Raises:
        ConfigError: the share or the level is invalid, or another level was used before.
        DataError: the state of earlier audits is damaged.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"--audit: must be from 0 to 1, not {share}")
    if not 0 < alarm_level < 1:
        raise ConfigError(f"--alarm-level: must be between 0 and 1, not {alarm_level}")
    content = read_audit_file(path) or AuditFile(seed=secrets.randbits(63))
    known = dict(content.certificates)
    for calibration in filter(can_audit, calibrations):
        digest, certificate = calibration.sha256, calibration.certificate
        if reset or digest not in known:
            monitor = new_monitor(certificate.risk, alarm_level)
            known[digest] = CertificateAudits(task=certificate.task, monitors=(monitor,))
        elif known[digest].monitors[-1].alarm_level != alarm_level:
            raise ConfigError(
                f"--alarm-level: the audits of task {certificate.task} began with "
                f"{known[digest].monitors[-1].alarm_level:g}; keep it, or begin again with --reset-audits"
            )
    return content.model_copy(update={"certificates": known})
