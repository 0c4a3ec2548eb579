"""Many requests through an engine: the order of what comes, how many are in it, and what a failure does."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ee.inference.offline import in_order, run_batch
from megatron_ee.inference.requests import Completion, Event, Request


class LastFirst:
    """Ends the newest of its requests at each step; ``fails`` are those, by number, that end with an error."""

    def __init__(self, fails: int) -> None:
        self.open: list[tuple[int, Request]] = []
        self.most = self.count = 0
        self.fails = fails

    def submit(self, request: Request) -> int:
        self.count += 1
        self.open.append((self.count, request))
        self.most = max(self.most, len(self.open))
        return self.count

    def step(self) -> list[Event]:
        number, request = self.open.pop()
        if number == self.fails:
            return [Event(number, 0, error="not finite")]
        done = Completion(str(request.prompt), (), (), "length", {})
        return [Event(number, sample, completion=done) for sample in reversed(range(request.samples))]


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_outcomes_come_in_order(ahead: int) -> None:
    requests = [Request(prompt=str(number), samples=1 + (number == 4)) for number in range(8)]
    engine: Any = LastFirst(fails=3)
    advanced: list[int] = []
    finished = list(run_batch(engine, requests, ahead=ahead, advance=advanced.append))
    assert sorted(index for index, _ in finished) == list(range(8))
    assert ahead == 1 or finished[0][0] == min(ahead, 8) - 1
    found = list(in_order(finished))
    outputs = [[each if isinstance(each, str) else each.text for each in outcomes] for outcomes in found]
    failed = next(number for number, texts in enumerate(outputs) if texts == ["not finite"])
    expected = [[str(number)] * request.samples for number, request in enumerate(requests)]
    expected[failed] = ["not finite"]
    assert outputs == expected and len(advanced) == 8
    assert engine.most == min(ahead, 8)
