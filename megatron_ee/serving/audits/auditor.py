"""Audits: a share of the requests under a certificate also runs in full mode, which tells whether the promise is kept.

- A request is drawn when it is admitted, by its number and a secret seed. Neither content nor load decides.
- An audit runs as a background request, when the engine has nothing else to do. If that takes too long it runs like any
  other request: it is never dropped, and what waits is bounded.
- If the client left before the answer was complete, the answer is generated again. What has no answer counts as a loss
  of 1.
- The losses reach the tests (``evaluation.drift.monitor``) in the order of admission, and the exit log has those that
  were counted. So at the end of a server it has no later audit than the first one that is missing.
- The test *from the start* decides: the probability that it ever gives a false alarm is at most the alarm level. On its
  alarm the certificate's requests fall back (``Rules.set_alarms``), also after a restart, until somebody ends it on
  purpose. The restarting test is reported only: its false alarms come every few hundred audits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.errors import UserError
from megatron_ee.evaluation.drift.audits import Audit, audited
from megatron_ee.evaluation.drift.monitor import DriftMonitor
from megatron_ee.inference.certificate import Calibration
from megatron_ee.inference.requests import Completion
from megatron_ee.serving.audits.audit_file import AuditFile, CertificateAudits, can_audit, write_audit_file
from megatron_ee.serving.audits.comparison import Comparison, ServerEnds, compare
from megatron_ee.serving.console import say
from megatron_ee.serving.rules.rules import Decision, Rules

if TYPE_CHECKING:
    from megatron_ee.serving.engine_loop import EngineLoop

_LOGGER = logging.getLogger(__name__)
PATIENCE = 600.0
"""Seconds that an audit waits for an idle engine before it runs like any other request."""


@dataclass(frozen=True)
class AuditResult:
    """One audit.

    Attributes:
        audit: for the exit log. Its certificate is None if the request ran in a safer setting: then it says nothing of
            the certified one.
        task: of the certificate.
        agrees: whether the answer is full mode's, token by token.
        failed: whether there was no answer to compare with.
    """

    audit: Audit
    task: str
    agrees: bool
    failed: bool = False


@dataclass(frozen=True)
class DriftTest:
    """The tests of one certificate.

    Attributes:
        certificate: SHA-256 of its file.
        task: of the certificate.
        monitor: the tests of the setting that is in force, or of the one that ran before full mode.
        fallback: whether its requests run safer than it allows, since the test from the start has alarmed.
        restarts: alarms of the restarting test, of all settings so far.
    """

    certificate: str
    task: str
    monitor: DriftMonitor
    fallback: bool
    restarts: int


class Auditor:
    """Draws, runs and counts audits. For the asyncio thread.

    A server with certificates has one also without audits (a share of 0), since a fallback outlasts them.
    """

    def __init__(
        self,
        rules: Rules,
        engine_loop: EngineLoop,
        path: Path,
        content: AuditFile,
        share: float,
        *,
        patience: float = PATIENCE,
        report: Callable[[str], None] = say,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Go on with the audits of earlier servers, and put their fallbacks into force again.

        Args:
            rules: whose certificates are audited.
            engine_loop: runs the audits.
            path: of the state.
            content: from ``begin_audits``. It is written to ``path``.
            share: of the requests to audit, in [0, 1].
            patience: seconds that an audit waits for an idle engine.
            report: gets the lines for the operator.
            clock: seconds since 1970.

        Raises:
            CheckpointError: the state cannot be written.
        """
        self._rules, self._engine_loop, self._share = rules, engine_loop, share
        self._path, self._content = path, content
        self._patience, self._report, self._clock = patience, report, clock
        self._certificates = {each.sha256: each.certificate for each in rules.calibrations if can_audit(each)}
        self._waiting: dict[int, Decision] = {}  # drawn, not yet counted
        self._results: dict[int, AuditResult] = {}
        self._turns: dict[int, asyncio.Future[AuditResult | None]] = {}  # what ``audit`` waits for
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        write_audit_file(path, content)
        for digest, state in content.certificates.items():
            rules.set_alarms(digest, len(state.alarms))
        for calibration in rules.calibrations:
            self._report_start(calibration)

    def draw(self, decision: Decision, number: int) -> bool:
        """Whether a request is audited. Called once for each request, when the engine has admitted it.

        If it is, ``audit`` must be called at its end, however it ends.

        Args:
            decision: how it runs.
            number: of the request in the order of admission; it goes on after a restart.
        """
        drawn = audited(number, self._content.seed, self._share)
        if not drawn or self._closed or decision.certificate not in self._certificates:
            return False
        self._waiting[number] = decision
        return True

    async def audit(self, number: int, early: Sequence[Completion] = ()) -> AuditResult | None:
        """Run the audit of a request that was drawn, and wait until it is counted, which is when its turn has come.

        It goes on if the caller is cancelled.

        Args:
            number: as for ``draw``.
            early: its outputs, in their order. If one is missing, failed or was cancelled, all are generated again.

        Returns:
            None if the server ended before. Then it was not counted.
        """
        if number not in self._waiting:  # closed in the meantime
            return None
        turn = self._turns[number] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._audit(number, self._waiting[number], early))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(turn)

    async def close(self, seconds: float = 0.0) -> None:
        """End the audits. Those that are not finished in time are left out, and so are all that were admitted later.

        Args:
            seconds: that they have.
        """
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._waiting:
            for decision in self._waiting.values():
                state = self._state_of(decision)
                self._set(decision, state.model_copy(update={"unfinished": state.unfinished + 1}))
            self._waiting.clear()
            self._write()
        for turn in self._turns.values():
            turn.set_result(None)
        self._turns.clear()

    def state(self) -> dict[str, Any]:
        """The tests by task, in JSON types."""
        return {state.task: self._described(digest, state) for digest, state in self._current()}

    def tests(self) -> list[DriftTest]:
        """The tests of each certificate, for metrics."""
        return [
            DriftTest(
                digest,
                state.task,
                self._shown(state),
                bool(state.alarms),
                sum(monitor.restarts for monitor in state.monitors),
            )
            for digest, state in self._current()
        ]

    # -------------------------------------------------------------------------------------------------- one audit

    async def _audit(self, number: int, decision: Decision, early: Sequence[Completion]) -> None:
        certificate = self._certificates[_certificate_of(decision)]
        try:
            found = await compare(self._engine_loop, certificate, decision.request, early, self._patience)
        except (ServerEnds, asyncio.CancelledError):  # what was admitted later then has no turn, see ``_count``
            return
        except Exception:  # without a result no later audit would be counted
            _LOGGER.exception("audits: task %s: the answers cannot be compared", certificate.task)
            found = Comparison(1.0, agrees=False, failed=True)
        if found.failed:
            self._report(f"audits: task {certificate.task}: a request has no answer to compare; counted as a loss of 1")
        audit = Audit(loss=found.loss, certificate=None if decision.alarms else decision.certificate)
        self._results[number] = AuditResult(audit, certificate.task, found.agrees, found.failed)
        self._count()

    # --------------------------------------------------------------------------------------------------- counting

    def _count(self) -> None:
        """Give the tests the results whose turn it is: those before which no drawn request is missing."""
        counted = False
        while self._waiting and (number := min(self._waiting)) in self._results:
            decision, result = self._waiting.pop(number), self._results.pop(number)
            state = self._state_of(decision)
            alarmed = state.updated(result.audit.loss, decision.alarms, number, self._now())
            self._set(decision, alarmed.model_copy(update={"failed": state.failed + result.failed}))
            counted = True
            self._turns.pop(number).set_result(result)
            if len(alarmed.alarms) > len(state.alarms):
                self._fall_back(decision, alarmed)
        if counted:
            self._write()

    def _fall_back(self, decision: Decision, state: CertificateAudits) -> None:
        self._rules.set_alarms(_certificate_of(decision), len(state.alarms))
        test = state.monitors[-2]
        self._report(
            f"audits: task {state.task}: ALARM after {test.audits} audits: the mean loss, {test.mean_loss:.4f}, seems "
            f"to be above the certified risk of {test.risk:g} (p = {test.p_value:.2g}); its requests now run in "
            f"{self._rules.fallback(state.task)}; calibrate again on recent requests"
        )

    def _write(self) -> None:
        """Keep the state. A full disk does not end the server: it is written again after the next audit."""
        try:
            write_audit_file(self._path, self._content)
        except UserError as error:
            self._report(f"audits: {error}; a restart now would forget the last audits")

    def _state_of(self, decision: Decision) -> CertificateAudits:
        return self._content.certificates[_certificate_of(decision)]

    def _set(self, decision: Decision, state: CertificateAudits) -> None:
        certificates = {**self._content.certificates, _certificate_of(decision): state}
        self._content = self._content.model_copy(update={"certificates": certificates})

    # -------------------------------------------------------------------------------------------------- describing

    def _current(self) -> list[tuple[str, CertificateAudits]]:
        """The certificates of this server, not those of earlier ones."""
        return [(digest, self._content.certificates[digest]) for digest in self._certificates]

    def _shown(self, state: CertificateAudits) -> DriftMonitor:
        """The tests of the setting in force; in full mode, where nothing is audited, those that alarmed last."""
        fallback = self._rules.fallback(state.task)
        return state.monitors[-2 if fallback is not None and fallback.safer is None else -1]

    def _described(self, digest: str, state: CertificateAudits) -> dict[str, Any]:
        test, fallback = self._shown(state), self._rules.fallback(state.task)
        waiting = sum(each.certificate == digest for each in self._waiting.values())
        return {
            "certificate": digest,
            "risk": test.risk,
            "alarm_level": test.alarm_level,
            "audits": test.audits,
            "mean_loss": test.mean_loss,
            "p_value": test.p_value,
            "restarting": {"sum": test.detector, "alarms": test.restarts},
            "alarms": [alarm.model_dump() for alarm in state.alarms],
            "fallback": None if fallback is None else str(fallback),
            "waiting": waiting,
            "failed": state.failed,
            "unfinished": state.unfinished,
        }

    def _report_start(self, calibration: Calibration) -> None:
        """Say what an operator might not expect of a certificate."""
        certificate = calibration.certificate
        if self._share and not can_audit(calibration):
            self._report(
                f"audits: task {certificate.task}: not audited: the loss of its certificate is {certificate.loss}, by "
                f"{certificate.metric} against references, which no request has; calibrate with --loss disagreement "
                "or rouge"
            )
        state = self._content.certificates.get(calibration.sha256)
        if state is not None and state.alarms:
            self._report(
                f"audits: task {state.task}: still in {self._rules.fallback(state.task)} after the alarm of "
                f"{state.alarms[-1].time}; calibrate again on recent requests, or end it with --reset-audits"
            )

    def _now(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock()))


def _certificate_of(decision: Decision) -> str:
    assert decision.certificate is not None, "only requests under a certificate are drawn"
    return decision.certificate
