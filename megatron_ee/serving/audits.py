"""Audits: a share of the requests under a certificate also runs in full mode, which tells whether the promise is kept.

- A request is drawn when it is admitted, by its number and a secret seed. Neither content nor load decides.
- An audit runs as a background request, when the engine has nothing else to do. If that takes too long it runs like any
  other request: it is never dropped, and what waits is bounded.
- If the client left before the answer was complete, the answer is generated again. What has no answer counts as a loss
  of 1.
- The losses reach the tests (``evaluation.drift``) in the order of admission.
- The test *from the start* decides: it gives a false alarm ever with probability at most the alarm level. On its alarm
  the certificate's requests fall back (``Rules.fall_back``), also after a restart, until somebody ends it on purpose.
  The restarting test is reported only: its false alarms come every few hundred audits.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.errors import ConfigError, UserError
from megatron_ee.evaluation.audits import Audit, audited
from megatron_ee.evaluation.calibration.losses import loss_of
from megatron_ee.evaluation.drift import ALARM_LEVEL, DriftMonitor, new_monitor
from megatron_ee.evaluation.tasks.answers import TaskAnswer
from megatron_ee.inference.certificate import Calibration, Certificate
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Completion, Request
from megatron_ee.serving.audit_file import (
    AuditFile,
    CertificateAudits,
    new_audit_file,
    read_audit_file,
    write_audit_file,
)
from megatron_ee.serving.rules import Decision, Rules

if TYPE_CHECKING:
    from megatron_ee.serving.engine_loop import EngineLoop

PATIENCE = 600.0
"""Seconds that an audit waits for an idle engine before it runs like any other request."""
_RETRY = 1.0
"""Seconds before an audit asks a full queue again."""


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
        fallback: whether its requests run safer than it allows.
    """

    certificate: str
    task: str
    monitor: DriftMonitor
    fallback: bool


class _Ending(Exception):
    """The server ends, so the audit cannot be finished."""


class Auditor:
    """Draws, runs and counts audits. For the asyncio thread.

    Attributes:
        share: of the requests under certificates that are audited.
    """

    def __init__(
        self,
        rules: Rules,
        loop: EngineLoop,
        path: Path,
        content: AuditFile,
        share: float,
        *,
        patience: float = PATIENCE,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Use ``open`` instead."""
        self.share = share
        self._rules, self._loop, self._path, self._content = rules, loop, path, content
        self._patience, self._report, self._clock = patience, report, clock
        self._certificates = {each.sha256: each.certificate for each in rules.calibrations if can_audit(each)}
        self._waiting: dict[int, Decision] = {}  # drawn, not yet counted
        self._results: dict[int, AuditResult] = {}
        self._tasks: set[asyncio.Task[AuditResult | None]] = set()
        self._closed = False
        for digest, state in content.certificates.items():
            rules.fall_back(digest, len(state.alarms))

    @classmethod
    def open(
        cls,
        rules: Rules,
        loop: EngineLoop,
        path: Path,
        share: float,
        *,
        alarm_level: float = ALARM_LEVEL,
        reset: bool = False,
        patience: float = PATIENCE,
        report: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Auditor:
        """Read the state of earlier audits, and put a fallback into force again.

        A server with certificates opens this also without audits (a share of 0), since a fallback outlasts them.

        Args:
            rules: whose certificates are audited.
            loop: runs the audits.
            path: of the state, beside the exit log; see ``state_path``.
            share: of the requests to audit, in [0, 1].
            alarm_level: of the tests.
            reset: begin the tests of these certificates again, and end their fallbacks.
            patience: seconds that an audit waits for an idle engine.
            report: gets the lines for the operator; by default they go to stderr.
            clock: seconds since 1970.

        Raises:
            ConfigError: the share or the level is invalid, or another level was used before.
            DataError: the state is damaged.
            CheckpointError: it cannot be written.
        """
        report = _to_stderr if report is None else report
        content = begin_audits(rules, path, share, alarm_level=alarm_level, reset=reset)
        write_audit_file(path, content)
        for calibration in rules.calibrations if share else ():
            if not can_audit(calibration):
                report(f"audits: task {calibration.certificate.task}: not audited: {_why_not(calibration.certificate)}")
        found = cls(rules, loop, path, content, share, patience=patience, report=report, clock=clock)
        for calibration in rules.calibrations:
            found._report_fallback(calibration)
        return found

    def draw(self, decision: Decision, number: int) -> bool:
        """Whether a request is audited. Called once for each request, when the engine has admitted it.

        If it is, ``audit`` must be called at its end, however it ends.

        Args:
            decision: how it runs.
            number: of the request in the order of admission; it goes on after a restart.
        """
        drawn = audited(number, self._content.seed, self.share)
        if not drawn or self._closed or decision.certificate not in self._certificates:
            return False
        self._waiting[number] = decision
        return True

    async def audit(self, number: int, early: Sequence[Completion] = ()) -> AuditResult | None:
        """Run the audit of a request that was drawn, and count it.

        It goes on if the caller is cancelled.

        Args:
            number: as for ``draw``.
            early: its outputs, in their order. If one is missing, failed or was cancelled, all are generated again.

        Returns:
            None if the server ended before.
        """
        if number not in self._waiting:  # closed in the meantime
            return None
        task = asyncio.create_task(self._audit(number, self._waiting[number], early))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

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

    def state(self) -> dict[str, Any]:
        """The tests by task, in JSON types."""
        return {state.task: self._described(digest, state) for digest, state in self._current()}

    def tests(self) -> list[DriftTest]:
        """The tests of each certificate, for metrics."""
        return [
            DriftTest(digest, state.task, self._shown(state), bool(state.alarms)) for digest, state in self._current()
        ]

    # -------------------------------------------------------------------------------------------------- one audit

    async def _audit(self, number: int, decision: Decision, early: Sequence[Completion]) -> AuditResult | None:
        try:
            result = await self._compare(decision, early)
        except (_Ending, asyncio.CancelledError):  # what was admitted later then has no turn, see ``_count``
            return None
        self._results[number] = result
        self._count()
        return result

    async def _compare(self, decision: Decision, early: Sequence[Completion]) -> AuditResult:
        assert decision.certificate is not None, "only such requests are drawn"
        certificate = self._certificates[decision.certificate]
        plain = decision.request.model_copy(update={"echo": False, "logprobs": None, "coverage": None})
        exact = {"mode": "full", "policy": ThresholdPolicy(), "exits": None}
        mine = _answers(early, plain.samples) or _answers(await self._run(plain), plain.samples)
        full = _answers(await self._run(plain.model_copy(update=exact)), plain.samples) if mine else ()
        counted = decision.certificate if not decision.alarms else None
        if not mine or not full:
            self._report(f"audits: task {certificate.task}: a request has no answer to compare; counted as a loss of 1")
            return AuditResult(Audit(loss=1.0, certificate=counted), certificate.task, agrees=False, failed=True)
        pairs = list(zip(mine, full, strict=True))
        losses = [loss_of(certificate.loss, certificate.metric or "", one, other, ()) for one, other in pairs]
        agrees = all(one.token_ids == other.token_ids for one, other in pairs)
        return AuditResult(Audit(loss=sum(losses) / len(losses), certificate=counted), certificate.task, agrees)

    async def _run(self, request: Request) -> list[Completion]:
        """The outputs of a request, in their order; fewer if one failed."""
        found = await self._run_once(request, background=True)
        while found is None:
            found = await self._run_once(request, background=False)
            if found is None:
                await asyncio.sleep(_RETRY)
        return found

    async def _run_once(self, request: Request, *, background: bool) -> list[Completion] | None:
        """As ``_run``; None if it has not started, because the engine is busy."""
        try:
            submission = self._loop.submit(request, background=background)
        except UserError:
            self._check_going_on()
            return None
        found: dict[int, Completion] = {}
        try:
            async with asyncio.timeout(self._patience if background else None):
                await submission.admitted()
            async for event in submission:
                if event.completion is not None:
                    found[event.sample] = event.completion
        except TimeoutError:
            submission.cancel()
            return None
        except ConfigError:  # the engine refuses it
            return []
        except UserError:
            self._check_going_on()
            return None
        except asyncio.CancelledError:
            submission.cancel()
            raise
        if len(found) < request.samples or any(each.finish_reason == "cancelled" for each in found.values()):
            self._check_going_on()  # the end of the server cancels requests
        return [found[sample] for sample in sorted(found)]

    def _check_going_on(self) -> None:
        """Find out why the engine did not take or finish a request.

        Raises:
            _Ending: the server ends.
        """
        if not self._loop.state().ready:
            raise _Ending

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
            if len(alarmed.alarms) > len(state.alarms):
                self._fall_back(decision, alarmed)
        if counted:
            self._write()

    def _fall_back(self, decision: Decision, state: CertificateAudits) -> None:
        assert decision.certificate is not None, "only such requests are drawn"
        self._rules.fall_back(decision.certificate, len(state.alarms))
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
        assert decision.certificate is not None, "only such requests are drawn"
        return self._content.certificates[decision.certificate]

    def _set(self, decision: Decision, state: CertificateAudits) -> None:
        assert decision.certificate is not None, "only such requests are drawn"
        certificates = {**self._content.certificates, decision.certificate: state}
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

    def _report_fallback(self, calibration: Calibration) -> None:
        state = self._content.certificates.get(calibration.sha256)
        if state is not None and state.alarms:
            self._report(
                f"audits: task {state.task}: still in {self._rules.fallback(state.task)} after the alarm of "
                f"{state.alarms[-1].time}; calibrate again on recent requests, or end it with --reset-audits"
            )

    def _now(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock()))


def state_path(exit_log: Path) -> Path:
    """Where the state is kept, beside the exit log."""
    return exit_log.with_name(f"{exit_log.name}.audits.json")


def begin_audits(
    rules: Rules, path: Path, share: float, *, alarm_level: float = ALARM_LEVEL, reset: bool = False
) -> AuditFile:
    """The state with which an ``Auditor`` begins; arguments as for ``Auditor.open``. Changes nothing on disk.

    Raises:
        ConfigError: the share or the level is invalid, or another level was used before.
        DataError: the state of earlier audits is damaged.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"--audit: must be from 0 to 1, not {share}")
    if not 0 < alarm_level < 1:
        raise ConfigError(f"--alarm-level: must be between 0 and 1, not {alarm_level}")
    content = read_audit_file(path) or new_audit_file()
    known = dict(content.certificates)
    for calibration in filter(can_audit, rules.calibrations):
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


def can_audit(calibration: Calibration) -> bool:
    """Whether audits can tell a certificate's loss."""
    return calibration.certificate.loss != "quality"


def _why_not(certificate: Certificate) -> str:
    return (
        f"the loss of its certificate is {certificate.loss}, by {certificate.metric} against references, which no "
        "request has; calibrate with --loss disagreement or rouge"
    )


def _answers(completions: Sequence[Completion], samples: int) -> tuple[TaskAnswer, ...]:
    """Outputs as the losses read them; none if one is missing or was cut off."""
    if len(completions) != samples or any(each.finish_reason == "cancelled" for each in completions):
        return ()
    return tuple(_answer(each) for each in completions)


def _answer(completion: Completion) -> TaskAnswer:
    return TaskAnswer(
        text="".join(completion.pieces),  # without the prompt, which the text may begin with
        token_ids=tuple(token.id for token in completion.tokens),
        layers=(),
        confidences=(),
        layers_per_token=None,
        finish_reason=completion.finish_reason,
        seconds=0.0,
    )


def _to_stderr(line: str) -> None:
    print(f"megatron-ee serve: {line}", file=sys.stderr, flush=True)
