"""Many requests through an engine, without holding more of them in it than keep it busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_ee.inference.assembly import MAX_ROWS
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.requests import Completion, Request

Outcome = Completion | str
"""Of one output: what came, or why it failed, in one line."""


def run_batch(
    engine: Engine,
    requests: Sequence[Request],
    *,
    ahead: int = 2 * MAX_ROWS,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Iterator[list[Outcome]]:
    """Answer all requests concurrently; outcomes by sample, in the order of the requests, as soon as they are known.

    A request that fails does not end the others.

    Args:
        engine: to itself: events of other requests are lost.
        ahead: requests in the engine at a time: enough that it never waits for one, few enough for a short queue.
        advance: called with the number of tokens of a request when it has ended, in whatever order they do.

    Raises:
        ConfigError: a request is refused; ``Engine.check`` says so beforehand.
    """
    numbers: dict[int, int] = {}  # number in the engine -> index among the requests
    done: dict[int, dict[int, Outcome]] = {}
    started = 0
    for index, request in enumerate(requests):
        while len(done.get(index, {})) < request.samples:
            while started < len(requests) and len(numbers) < ahead:
                numbers[engine.submit(requests[started])] = started
                started += 1
            for event in engine.step():
                outcome = event.completion if event.error is None else event.error
                if outcome is None or event.request not in numbers:
                    continue
                at = numbers[event.request]
                outcomes = done.setdefault(at, {})
                outcomes[event.sample] = outcome
                if len(outcomes) == requests[at].samples:
                    del numbers[event.request]
                    advance(sum(len(each.tokens) for each in outcomes.values() if isinstance(each, Completion)))
        yield [outcome for _, outcome in sorted(done.pop(index).items())]
