"""Audits on a real engine in its own thread: each loss is what the engine says of that request alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ee.evaluation.drift.monitor import new_monitor, run_monitor
from megatron_ee.inference.certificate import Calibration
from megatron_ee.inference.loading import open_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.released import open_released
from megatron_ee.inference.requests import Completion, Request
from megatron_ee.serving.audits.audit_file import begin_audits
from megatron_ee.serving.audits.auditor import Auditor, AuditResult
from megatron_ee.serving.engine_loop import EngineLoop
from megatron_ee.serving.rules.rules import Controls, Decision, Rules

pytestmark = pytest.mark.slow
THRESHOLDS = {1: 0.02, 2: 0.02}
PROMPTS = [tuple(3 + (number * 37 + place * 11) % 250 for place in range(2 + number % 5)) for number in range(40)]


@pytest.fixture
def calibration(calibrate: Callable[..., Calibration]) -> Calibration:
    policy = {"name": "threshold", "threshold": 2.0, "thresholds": THRESHOLDS}
    return calibrate(policy=policy, full_layers=4, tested={}, risk=0.2)


def test_losses_on_a_real_engine(byte_model: Path, adapter: Path, calibration: Calibration, tmp_path: Path) -> None:
    released = open_released(byte_model, adapter)
    lines: list[str] = []

    async def serve(loop: EngineLoop, rules: Rules) -> list[tuple[Decision, AuditResult | None]]:
        loop.start()
        path = tmp_path / "audits.json"
        content = begin_audits(path, rules.calibrations, 1.0)
        auditor = Auditor(rules, loop, path, content, 1.0, report=lines.append)

        async def one(number: int) -> tuple[Decision, AuditResult | None]:
            decision = rules.decide(Request(prompt=PROMPTS[number], max_tokens=32), Controls(), None, chat=True)
            submission = loop.submit(decision.request)
            await submission.admitted()
            if not auditor.draw(decision, number):
                return decision, None
            if number % 4 == 1:
                submission.cancel()
            events = [event async for event in submission]
            return decision, await auditor.audit(number, [e.completion for e in events if e.completion is not None])

        try:
            first = await asyncio.gather(*(one(number) for number in range(len(PROMPTS) // 2)))
            rest = await asyncio.gather(*(one(number) for number in range(len(PROMPTS) // 2, len(PROMPTS))))
            await auditor.close(5.0)
            assert auditor.state()["inquiries"]["unfinished"] == 0
            [test] = auditor.tests()
            counted = [result.audit.loss for _, result in (*first, *rest) if result is not None]
            assert test.monitor == run_monitor(new_monitor(0.2), counted).monitor
            return [*first, *rest]
        finally:
            await loop.stop()

    with open_engine(released, EngineOptions(dtype="float32")) as engine:
        assert engine is not None
        rules = Rules(None, [calibration], exits=engine.exits, num_layers=engine.num_layers)
        decided = rules.decide(Request(prompt=PROMPTS[0], max_tokens=32), Controls(), None, chat=True).request
        alone: list[tuple[Completion, Completion]] = []
        for prompt in PROMPTS:
            early = decided.model_copy(update={"prompt": prompt})
            [[mine]], [[full]] = engine.generate([early]), engine.generate([Request(prompt=prompt, max_tokens=32)])
            alone.append((mine, full))
        found = asyncio.run(serve(EngineLoop(engine), rules))

    differ = [[t.id for t in mine.tokens] != [t.id for t in full.tokens] for mine, full in alone]
    assert any(differ) and any(mine.statistics["mean_exit_layer"] < 4 for mine, _ in alone)
    for (decision, result), expected in zip(found, differ, strict=True):
        if decision.request.mode == "threshold":
            assert result is not None and result.audit.loss == float(expected) and not result.failed
    assert any("ALARM" in line for line in lines), "these exits are wrong almost everywhere"
    assert found[-1][0].request.mode == "full" and found[-1][1] is None
