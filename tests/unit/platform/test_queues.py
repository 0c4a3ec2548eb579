"""What is measured of a device's queued work."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_ee import platform
from megatron_ee.platform import queues


def test_a_timer_measures_what_lies_between() -> None:
    timer = platform.DeviceTimer()
    time.sleep(0.05)
    timer.stop()
    time.sleep(0.05)
    assert 0.05 <= timer.seconds() < 0.1 or platform.has_accelerator()


def test_a_timer_waits_for_its_events_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 250.0

    monkeypatch.setattr(queues, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = platform.DeviceTimer()
    timer.stop()
    assert log == ["record", "record"]
    assert timer.seconds() == 0.25 and log[2:] == ["wait"]
