"""Audits: the draw, the runs in idle time, the order of the tests, and what an alarm does, also after a restart."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ee.commands.main import main as run_command
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError, DataError, UserError
from megatron_ee.evaluation.drift.audits import Audit, audited, read_audits
from megatron_ee.evaluation.drift.monitor import new_monitor, run_monitor
from megatron_ee.inference.certificate import Calibration
from megatron_ee.inference.requests import Completion, Event, Request, Token
from megatron_ee.serving.audits.audit_file import adopt_old_state, begin_audits, read_audit_file, state_path
from megatron_ee.serving.audits.auditor import Auditor
from megatron_ee.serving.exit_log import ExitLog
from megatron_ee.serving.exit_record import ExitRecord
from megatron_ee.serving.rules.rules import Controls, Decision, Rules

Calibrate = Callable[..., Calibration]


def completion(ids: tuple[int, ...], reason: Any = "length") -> Completion:
    words = tuple(f" w{each}" for each in ids)
    tokens = tuple(Token(each, 4, 0.9) for each in ids)
    return Completion("".join(words), tokens, words, reason, {})


def record(number: int, audit: Audit | None) -> ExitRecord:
    facts: dict[str, Any] = {"mode": "threshold", "prompt_tokens": 1, "seconds": 1.0, "tokens": 2}
    facts |= {"time": "2026-11-30T09:00:00Z", "task": "inquiries"}
    return ExitRecord(number=number, id=f"request-{number}", audit=audit, **facts)


class FakeSubmission:
    """A request of the fake loop. It is admitted when the loop says so."""

    def __init__(self, request: Request, background: bool) -> None:
        self.request, self.background, self.cancelled = request, background, False
        self.start: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ids: tuple[int, ...] | None = (1, 2)
        self.reason = "length"

    async def admitted(self) -> None:
        await asyncio.shield(self.start)

    async def __aiter__(self) -> AsyncIterator[Event]:
        for sample in range(self.request.samples):
            if self.ids is None:
                yield Event(0, sample, error="logits are not finite")
            else:
                yield Event(0, sample, completion=completion(self.ids, self.reason))

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeLoop:
    """Answers audits: at once, or when told to."""

    at_once: bool = True
    ready: bool = True
    full: int = 0
    answers: dict[tuple[int, ...], tuple[int, ...] | None] = field(default_factory=dict)
    submitted: list[FakeSubmission] = field(default_factory=list)

    def submit(self, request: Request, *, background: bool = False) -> FakeSubmission:
        if not self.ready:
            raise UserError("the server is stopping")
        if self.full and not background:
            self.full -= 1
            raise UserError("the queue is full")
        submission = FakeSubmission(request, background)
        if request.mode == "full":
            submission.ids = self.answers.get(tuple(request.prompt), (1, 2))  # type: ignore[arg-type]
        self.submitted.append(submission)
        if self.at_once or not background:
            submission.start.set_result(None)
        return submission

    def state(self) -> Any:
        return SimpleNamespace(ready=self.ready)


class Server:
    """Rules, a fake loop and an auditor."""

    def __init__(self, path: Path, calibrations: list[Calibration], share: float = 1.0, **options: Any) -> None:
        self.lines: list[str] = []
        self.loop = FakeLoop()
        rules_file = options.pop("rules", None)
        exits = [ExitSpec(2), ExitSpec(4)]
        self.rules = Rules(rules_file, calibrations, exits=exits, num_layers=6)
        patience = options.pop("patience", 600.0)
        self.auditor = Auditor(
            self.rules,
            self.loop,  # type: ignore[arg-type]
            path,
            begin_audits(path, calibrations, share, **options),
            share,
            patience=patience,
            report=self.lines.append,
            clock=lambda: 0.0,
        )

    def decide(self, number: int, **controls: Any) -> Decision:
        request = Request(prompt=(number,), max_tokens=32)
        return self.rules.decide(request, Controls(**controls), None, chat=True)

    async def answer(self, number: int, differs: bool = False, **controls: Any) -> Any:
        """One request to its end, with its audit if it is drawn."""
        decision = self.decide(number, **controls)
        if not self.auditor.draw(decision, number):
            return None
        return await self.auditor.audit(number, [completion((1, 3) if differs else (1, 2))])


def test_only_requests_under_a_certificate_are_drawn_by_number_alone(tmp_path: Path, calibrate: Calibrate) -> None:
    server = Server(tmp_path / "a.json", [calibrate()], share=0.2)
    content = read_audit_file(tmp_path / "a.json")
    assert content is not None
    drawn = [number for number in range(500) if server.auditor.draw(server.decide(number), number)]
    assert drawn == [number for number in range(500) if audited(number, content.seed, 0.2)]
    assert 60 < len(drawn) < 140
    other = Server(tmp_path / "b.json", [calibrate()])
    for controls in ({"mode": "full"}, {"important": True}, {"mode": "speculative"}):
        assert not other.auditor.draw(other.decide(0, **controls), 0)
    long = other.rules.decide(Request(prompt=(1,), max_tokens=99), Controls(uncertified=True), None, chat=True)
    assert long.request.mode == "threshold" and not other.auditor.draw(long, 0)
    assert other.auditor.draw(other.decide(0), 0)


def test_an_audit_is_one_run_in_full_mode_in_the_background(tmp_path: Path, calibrate: Calibrate) -> None:
    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()])
        same, other = await server.answer(0), await server.answer(1, differs=True)
        assert same.audit.model_dump() == {"loss": 0.0, "certificate": "a" * 64} and same.agrees
        assert other.audit.model_dump() == {"loss": 1.0, "certificate": "a" * 64} and not other.agrees
        assert (same.task, same.failed) == ("inquiries", False)
        first, second = server.loop.submitted
        assert first.background and first.request.mode == "full" and first.request.coverage is None
        assert (first.request.prompt, first.request.max_tokens, second.request.prompt) == ((0,), 32, (1,))
        state = server.auditor.state()["inquiries"]
        assert (state["audits"], state["mean_loss"], state["waiting"], state["fallback"]) == (2, 0.5, 0, None)

    asyncio.run(main())


def test_the_loss_is_the_certificates(tmp_path: Path, calibrate: Calibrate) -> None:
    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate(loss="rouge")])
        found = await server.answer(0, differs=True)
        assert found.audit.loss == 0.5 and not found.agrees  # one word of two

    asyncio.run(main())


def test_certificates_that_need_references_are_not_audited(tmp_path: Path, calibrate: Calibrate) -> None:
    server = Server(tmp_path / "a.json", [calibrate(loss="quality", metric="f1"), calibrate("orders", "b")])
    assert re.search("task inquiries: not audited: .*references", "\n".join(server.lines))
    assert not server.auditor.draw(server.decide(0, task="inquiries"), 0)
    assert server.auditor.draw(server.decide(1, task="orders"), 1)
    assert list(server.auditor.state()) == ["orders"]


def test_an_answer_that_was_cut_off_is_generated_again(tmp_path: Path, calibrate: Calibrate) -> None:
    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()])
        for number, early in enumerate(([], [completion((1,), "cancelled")])):
            decision = server.decide(number)
            assert server.auditor.draw(decision, number)
            found = await server.auditor.audit(number, early)
            assert found is not None and found.audit.loss == 0.0 and not found.failed
        assert [each.request.mode for each in server.loop.submitted] == ["threshold", "full"] * 2
        assert server.loop.submitted[0].request.policy == decision.request.policy

    asyncio.run(main())


def test_an_audit_without_an_answer_is_a_loss_of_1(tmp_path: Path, calibrate: Calibrate) -> None:
    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()])
        server.loop.answers[(0,)] = None
        found = await server.answer(0)
        assert found.failed and found.audit.loss == 1.0
        assert server.auditor.state()["inquiries"]["failed"] == 1
        assert "counted as a loss of 1" in server.lines[0]

    asyncio.run(main())


def test_an_audit_that_the_engine_refuses_is_a_loss_of_1(tmp_path: Path, calibrate: Calibrate) -> None:
    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()])
        server.loop.at_once = False
        call = asyncio.create_task(server.answer(0))
        await asyncio.sleep(0.01)
        server.loop.submitted[0].start.set_exception(UserError("the request cannot be processed: a bug"))
        found = await asyncio.wait_for(call, 10)
        assert found.failed and found.audit.loss == 1.0
        assert len(server.loop.submitted) == 1, "it was not asked again"

    asyncio.run(main())


def test_an_audit_that_waits_too_long_runs_like_other_requests(
    tmp_path: Path, calibrate: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ee.serving.audits.comparison.RETRY_SECONDS", 0.01)

    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()], patience=0.05)
        server.loop.at_once, server.loop.full = False, 2
        found = await server.answer(0)
        assert found.audit.loss == 0.0
        waited, ran = server.loop.submitted
        assert waited.background and waited.cancelled and not ran.background
        assert server.loop.full == 0, "it asked the full queue again"

    asyncio.run(main())


def test_an_audit_goes_on_if_the_caller_is_cancelled(tmp_path: Path, calibrate: Calibrate) -> None:
    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()])
        server.loop.at_once = False
        call = asyncio.create_task(server.answer(0, differs=True))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        server.loop.submitted[0].start.set_result(None)
        await asyncio.sleep(0.01)
        assert server.auditor.state()["inquiries"]["audits"] == 1

    asyncio.run(main())


def test_losses_are_counted_in_the_order_of_admission(tmp_path: Path, calibrate: Calibrate) -> None:
    losses = [1.0, 0.0, 0.0, 1.0, 0.0]

    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()])
        server.loop.at_once = False
        for number in range(5):
            assert server.auditor.draw(server.decide(number), number)
        early = [completion((1, 3) if loss else (1, 2)) for loss in losses]
        calls = [asyncio.create_task(server.auditor.audit(number, [early[number]])) for number in range(5)]
        await asyncio.sleep(0.01)
        runs = {each.request.prompt[0]: each for each in server.loop.submitted}
        counts = []
        for number in (3, 1, 0, 4, 2):
            runs[number].start.set_result(None)
            await asyncio.sleep(0.01)
            counts.append(server.auditor.state()["inquiries"]["audits"])
            assert [call.done() for call in calls] == [each < counts[-1] for each in range(5)]
        assert counts == [0, 0, 2, 2, 5]
        assert [(await call).audit.loss for call in calls] == losses
        content = read_audit_file(tmp_path / "a.json")
        assert content is not None
        monitor = content.certificates["a" * 64].monitors[0]
        assert monitor == run_monitor(new_monitor(0.05), losses).monitor

    asyncio.run(main())


async def until_alarm(server: Server, start: int = 0) -> int:
    """The number of the request at which the fallback came."""
    alarms = len(server.auditor.state()["inquiries"]["alarms"])
    for number in range(start, start + 500):
        await server.answer(number, differs=True)
        if len(server.auditor.state()["inquiries"]["alarms"]) > alarms:
            return number
    raise AssertionError("no alarm")


def test_an_alarm_puts_the_task_into_full_mode_for_good(tmp_path: Path, calibrate: Calibrate) -> None:
    path = tmp_path / "a.json"

    async def main() -> None:
        server = Server(path, [calibrate()])
        last = await until_alarm(server)
        expected = run_monitor(new_monitor(0.05), [1.0] * 20).monitor
        assert last + 1 == expected.alarm
        assert last + 1 > 2, "the restarting test is not what decides"
        assert re.search(
            rf"ALARM after {last + 1} audits: .* above the certified risk of 0.05 .*full mode", server.lines[-1]
        )
        assert server.decide(99).request.mode == "full" and await server.answer(99) is None
        [test] = server.auditor.tests()
        assert test.fallback and test.monitor.alarm == last + 1

        again = Server(path, [calibrate()], share=0.0)  # without audits, too
        assert again.decide(0).request.mode == "full"
        assert "still in full mode after the alarm of 1970-01-01T00:00:00Z" in again.lines[0]
        assert Server(path, [calibrate(letter="c")]).decide(0).request.mode == "threshold", "a new certificate"
        assert Server(path, [calibrate()]).decide(0).request.mode == "full", "the old one again"
        reset = Server(path, [calibrate()], reset=True)
        assert reset.decide(0).request.mode == "threshold" and reset.lines == []
        assert Server(path, [calibrate()]).decide(0).request.mode == "threshold"

    asyncio.run(main())


def test_an_alarm_may_lead_to_a_safer_setting_with_tests_of_its_own(tmp_path: Path, calibrate: Calibrate) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("on_alarm: safer")

    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()], rules=rules)
        old = server.decide(400)
        assert server.auditor.draw(old, 400)  # admitted before the alarm, audited after it
        del server.auditor._waiting[400]
        first = await until_alarm(server)
        assert "its requests now run in the safer level" in server.lines[-1]
        [test] = server.auditor.tests()
        assert test.fallback and test.restarts > test.monitor.restarts == 0, "the alarms before stay in sight"
        found = await server.answer(first + 1, differs=True)
        assert found.audit.model_dump() == {"loss": 1.0, "certificate": None}, (
            "it says nothing of the certified setting"
        )
        assert server.auditor.state()["inquiries"]["audits"] == 1
        server.auditor.draw(old, 401)
        await server.auditor.audit(401, [completion((1, 2))])
        assert server.auditor.state()["inquiries"]["audits"] == 1, "it ran as certified"
        second = await until_alarm(server, first + 2)
        assert server.decide(0).request.mode == "full" and second > first
        content = read_audit_file(tmp_path / "a.json")
        assert content is not None
        state = content.certificates["a" * 64]
        assert len(state.alarms) == 2 and len(state.monitors) == 3
        assert [each.audits for each in state.monitors] == [first + 2, second - first, 0]

    asyncio.run(main())


def test_the_end_of_the_server_cuts_off_all_later_audits(tmp_path: Path, calibrate: Calibrate) -> None:
    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()])
        server.loop.at_once = False
        calls = []
        for number in range(3):
            assert server.auditor.draw(server.decide(number), number)
            calls.append(asyncio.create_task(server.auditor.audit(number, [completion((1, 2))])))
        await asyncio.sleep(0.01)
        for number in (0, 2):
            server.loop.submitted[number].start.set_result(None)
        await asyncio.sleep(0.01)
        server.loop.ready = False
        server.loop.submitted[1].start.set_exception(UserError("the server is stopping"))
        await server.auditor.close(0.01)
        results = await asyncio.gather(*calls)
        assert [each is None for each in results] == [False, True, True]
        again = Server(tmp_path / "a.json", [calibrate()])
        state = again.auditor.state()["inquiries"]
        assert (state["audits"], state["unfinished"]) == (1, 2)

    asyncio.run(main())


def test_the_exit_log_has_the_audits_that_were_counted(tmp_path: Path, calibrate: Calibrate) -> None:
    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()])
        server.loop.at_once = False
        log = ExitLog(tmp_path / "exits.jsonl")

        async def run(number: int) -> None:
            result = await server.auditor.audit(number, [completion((1, 2))])
            log.write(record(number, None if result is None else result.audit))

        for number in range(4):
            assert server.auditor.draw(server.decide(number), number)
        calls = [asyncio.create_task(run(number)) for number in (0, 2, 3, 1)]  # the second answer takes longest
        await asyncio.sleep(0.01)
        for submission in server.loop.submitted[:3]:
            submission.start.set_result(None)
        await asyncio.sleep(0.01)
        server.loop.ready = False
        server.loop.submitted[3].start.set_exception(UserError("the server is stopping"))
        await server.auditor.close(0.01)
        await asyncio.wait_for(asyncio.gather(*calls), 1)
        log.close()
        assert len(log.path.read_bytes().splitlines()) == 4, "no record is lost"
        assert [each.number for each in read_audits([log.path])] == [0]
        state = server.auditor.state()["inquiries"]
        assert (state["audits"], state["unfinished"]) == (1, 3)

    asyncio.run(main())


def test_an_error_in_a_comparison_holds_up_no_later_audit(
    tmp_path: Path, calibrate: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()])
        with monkeypatch.context() as patch:
            patch.setattr("megatron_ee.serving.audits.comparison.loss_of", None)
            found = await asyncio.wait_for(server.answer(0), 1)
        assert found.failed and found.audit.loss == 1.0
        assert (await asyncio.wait_for(server.answer(1), 1)).audit.loss == 0.0

    asyncio.run(main())


def test_audits_that_still_wait_at_the_end_have_no_result(tmp_path: Path, calibrate: Calibrate) -> None:
    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()])
        server.loop.at_once = False
        call = asyncio.create_task(server.answer(0))
        await asyncio.sleep(0.01)
        await server.auditor.close(0.01)
        assert await call is None and server.loop.submitted[0].cancelled
        assert not server.auditor.draw(server.decide(1), 1)

    asyncio.run(main())


def test_false_alarms_are_rarer_than_the_level(tmp_path: Path, calibrate: Calibrate) -> None:
    """At the boundary the restarting test would alarm every 183 audits on average."""
    import numpy as np

    generator, alarms, restarts = np.random.default_rng(3), 0, 0
    for _ in range(20):
        monitor = run_monitor(new_monitor(0.05), (generator.random(400) < 0.05).astype(float).tolist()).monitor
        alarms += monitor.alarm is not None
        restarts += monitor.restarts
    assert restarts > 10 and alarms <= 2


def test_a_damaged_state_is_not_forgotten_silently(tmp_path: Path, calibrate: Calibrate) -> None:
    path = tmp_path / "a.json"
    Server(path, [calibrate()])
    for content in ("{", "{}", json.dumps({"version": 1, "seed": 1, "certificates": {"a" * 64: {"task": "x"}}})):
        path.write_text(content)
        with pytest.raises(DataError, match="a.json: .*to end any fallback, remove the file"):
            Server(path, [calibrate()])


def test_a_full_disk_does_not_end_the_server(
    tmp_path: Path, calibrate: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        server = Server(tmp_path / "a.json", [calibrate()])

        def fail(path: Path, content: Any) -> None:
            raise UserError(f"{path}: cannot write: no space")

        monkeypatch.setattr("megatron_ee.serving.audits.auditor.write_audit_file", fail)
        await until_alarm(server)
        assert server.decide(0).request.mode == "full"
        assert any("no space" in line for line in server.lines)

    asyncio.run(main())


@pytest.mark.parametrize(
    "share, level, option", [(1.5, 0.01, "--audit"), (-0.1, 0.01, "--audit"), (0.1, 1.0, "--alarm")]
)
def test_bad_options_are_refused(tmp_path: Path, calibrate: Calibrate, share: float, level: float, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        Server(tmp_path / "a.json", [calibrate()], share, alarm_level=level)


def test_a_level_holds_for_the_whole_test(tmp_path: Path, calibrate: Calibrate) -> None:
    Server(tmp_path / "a.json", [calibrate()], alarm_level=0.05)
    with pytest.raises(ConfigError, match="--alarm-level: the audits of task inquiries began with 0.05"):
        Server(tmp_path / "a.json", [calibrate()])
    assert Server(tmp_path / "a.json", [calibrate()], reset=True).auditor.state()["inquiries"]["alarm_level"] == 0.01


def test_the_state_is_beside_the_log() -> None:
    assert state_path(Path("/var/log/exits.jsonl")) == Path("/var/log/exits-jsonl.audits.json")
    assert state_path(Path("/var/log/exits.8000")) != state_path(Path("/var/log/exits.8001"))


@pytest.mark.parametrize("command", [["drift", "--risk", "0.1"], ["exits-report"]])
def test_the_logs_pattern_of_the_docs_matches_nothing_but_logs(
    tmp_path: Path, calibrate: Calibrate, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    log = ExitLog(tmp_path / "exits.jsonl")

    async def serve() -> None:
        server = Server(state_path(log.path), [calibrate()])
        found = await server.answer(0)
        log.write(record(0, found.audit))

    asyncio.run(serve())
    log.close()
    assert state_path(log.path).exists()
    name, *options = command
    logs = [str(path) for path in tmp_path.glob("exits*.jsonl*")]
    assert run_command([name, *logs, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["audits"] if name == "drift" else found["total"]["requests"]) == 1


def test_the_state_of_an_earlier_version_is_taken_over(tmp_path: Path, calibrate: Calibrate) -> None:
    log = tmp_path / "exits.jsonl"
    old = Path(f"{log}.audits.json")
    Server(old, [calibrate()])
    content = read_audit_file(old)
    for _ in range(2):
        adopt_old_state(log)
        assert read_audit_file(state_path(log)) == content and not old.exists()
    old.write_text("{}")  # a newer state is not replaced
    adopt_old_state(log)
    assert read_audit_file(state_path(log)) == content
