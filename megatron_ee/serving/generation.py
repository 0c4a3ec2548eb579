"""One HTTP request from its admission to the record of its end: what it asks of the engine, and what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_ee.errors import ConfigError
from megatron_ee.inference.requests import MAX_DRAFT, Completion, Event, Request, Token
from megatron_ee.inference.sampling import Sampling
from megatron_ee.serving.api_errors import ApiError, refused
from megatron_ee.serving.engine_loop import EngineLoop
from megatron_ee.serving.records import Ended, record_end
from megatron_ee.serving.responses import Scored, scored_prompt
from megatron_ee.serving.service import Service
from megatron_ee.serving.submission import Submission
from megatron_ee.serving.translate import Generation, Prompt, renamed

if TYPE_CHECKING:
    from megatron_ee.serving.access import Key
    from megatron_ee.serving.exit_log import Status
    from megatron_ee.serving.limits import Grant
    from megatron_ee.serving.rules import Decision

MERGED_EVENTS = 64
"""Events of the requests of one HTTP request that wait to be sent, besides those in the engine loop's buffers."""
END_SECONDS = 60.0
"""Seconds for a cancelled request to end, before it is recorded without its last tokens."""


@dataclass
class PromptRun:
    """One prompt in the engine.

    Attributes:
        prompt: the prompt.
        decision: of the server's rules, with the request as it runs.
        number: of the request in the order of admission; None before the engine has admitted it.
        audited: whether it was drawn for an audit.
        scores: the prompt's tokens with their log-probabilities; None if they were not asked for.
        submission: None before its admission, and if no token is wanted.
        completions: of its outputs, by sample.
        error: of its outputs that failed, one of them.
    """

    prompt: Prompt
    decision: Decision
    number: int | None = None
    audited: bool = False
    scores: list[Scored] | None = None
    submission: Submission | None = None
    completions: dict[int, Completion] = field(default_factory=dict)
    error: str | None = None

    @property
    def status(self) -> Status:
        """How it ended, once it has."""
        if self.submission is not None and self.submission.timed_out:
            return "timeout"
        if self.error is not None:
            return "error"
        cancelled = any(each.finish_reason == "cancelled" for each in self.completions.values())
        return "cancelled" if cancelled else "ok"

    def take(self, event: Event) -> None:
        """Note an event."""
        if event.completion is not None:
            self.completions[event.sample] = event.completion
        if event.error is not None:
            self.error = event.error


class Running:
    """An HTTP request whose prompts the engine has accepted.

    Attributes:
        generation: what was asked for.
        parts: one per prompt.
    """

    def __init__(
        self,
        service: Service,
        generation: Generation,
        key: Key | None,
        grant: Grant | None,
        parts: list[PromptRun],
        id_: str,
    ) -> None:
        """Use ``admit`` instead."""
        self.generation, self.parts = generation, parts
        self._service, self._key, self._grant, self._id = service, key, grant, id_
        self._started, self._wall = time.perf_counter(), time.time()
        self._ended = False

    @property
    def completions(self) -> list[Completion]:
        """All that have ended, in the order of the answer's choices."""
        return [part.completions[sample] for part in self.parts for sample in sorted(part.completions)]

    def part(self, index: int) -> PromptRun:
        """The prompt of a choice."""
        return self.parts[index // self.generation.samples]

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """The events of all outputs with the indices of their choices, until all have ended.

        Raises:
            ApiError: an output failed, the deadline has come, or the server is stopping.
        """
        submissions = [part.submission for part in self.parts if part.submission is not None]
        async with aclosing(merged(submissions, lambda index, event: self.parts[index].take(event))) as events:
            async for index, event in events:
                cancelled = event.completion is not None and event.completion.finish_reason == "cancelled"
                if event.error is not None or cancelled:
                    raise self._failure(self.parts[index])
                yield index * self.generation.samples + event.sample, event

    def end(self) -> None:
        """Note that the HTTP request has ended, however it did. Whatever still runs is cancelled."""
        if self._ended:
            return
        self._ended = True
        task = asyncio.get_running_loop().create_task(self._record())
        self._service.tasks.add(task)
        task.add_done_callback(self._service.tasks.discard)

    def cancel(self) -> None:
        """End all that still runs."""
        for part in self.parts:
            if part.submission is not None and len(part.completions) < self.generation.samples:
                part.submission.cancel()

    async def _record(self) -> None:
        """Wait for the ends of cancelled outputs, and record the request."""
        self.cancel()
        for part in self.parts:
            unfinished = len(part.completions) < self.generation.samples and part.error is None
            if part.submission is not None and unfinished:
                try:
                    async with asyncio.timeout(END_SECONDS):
                        async for event in part.submission:
                            part.take(event)
                except TimeoutError:
                    part.error = "it did not end after it was cancelled"
        used = sum(len(part.prompt.ids) for part in self.parts) + sum(len(each.tokens) for each in self.completions)
        self._service.access.settle(self._key, self._grant, used)
        for index, part in enumerate(self.parts):
            if part.submission is None or part.number is None:
                continue
            await record_end(
                self._service,
                Ended(
                    id=self._id if len(self.parts) == 1 else f"{self._id}-{index}",
                    number=part.number,
                    wall=self._wall,
                    seconds=time.perf_counter() - self._started,
                    key=None if self._key is None else self._key.name,
                    status=part.status,
                    decision=part.decision,
                    prompt=part.prompt,
                    completions=[part.completions[sample] for sample in sorted(part.completions)],
                    audited=part.audited,
                ),
            )

    def _failure(self, part: PromptRun) -> ApiError:
        assert part.submission is not None
        if part.submission.timed_out:
            headers = {"X-Should-Retry": "false"}  # the official client would ask again, and wait as long again
            seconds = self._service.limits.deadline
            return refused(504, f"the answer was not ready after {seconds:g} seconds", "timeout", headers)
        if part.error is not None:
            return refused(500, part.error, "generation_failed")
        return refused(503, "the server is stopping", "stopping", {"Retry-After": "5"})


async def admit(service: Service, generation: Generation, key: Key | None, id_: str) -> Running:
    """Apply the server's rules and limits, and hand the prompts to the engine.

    Log-probabilities of prompts are computed first.

    Raises:
        ConfigError: a setting is wrong; the message names the field.
        UserError: the server cannot take it now; see ``EngineLoop.submit`` and ``Access.take``.
        ApiError: the computation of log-probabilities failed.
    """
    try:
        decisions = [
            service.rules.decide(request, generation.controls, key, chat=generation.chat)
            for request in generation.requests
        ]
    except ConfigError as error:
        raise ConfigError(renamed(str(error), generation.policy_field)) from None
    grant = service.access.take(key, generation.most_tokens)
    parts = [PromptRun(prompt, decision) for prompt, decision in zip(generation.prompts, decisions, strict=True)]
    running = Running(service, generation, key, grant, parts, id_)
    try:
        if generation.scores_prompts:
            await _score(service.loop, parts, service.limits.deadline)
        if generation.max_tokens > 0:
            for part in parts:
                part.submission = service.loop.submit(part.decision.request, deadline=service.limits.deadline)
            for part in parts:
                assert part.submission is not None
                await part.submission.admitted()
                part.number = next(service.numbers)
                part.audited = service.auditor is not None and service.auditor.draw(part.decision, part.number)
    except ConfigError as error:
        running.end()
        raise ConfigError(renamed(str(error), generation.policy_field)) from None
    except BaseException:
        running.end()
        raise
    return running


async def _score(loop: EngineLoop, parts: Sequence[PromptRun], deadline: float | None) -> None:
    """Compute the log-probabilities of the prompts' tokens."""
    wanted = [part for part in parts if len(part.prompt.ids) > 1]
    submissions: list[Submission] = []
    emitted: list[list[Token]] = [[] for _ in wanted]
    try:
        for part in wanted:
            submissions.append(loop.submit(scoring_request(part.decision.request), deadline=deadline))
        for submission in submissions:
            await submission.admitted()
        async with aclosing(merged(submissions)) as events:
            async for index, event in events:
                emitted[index] += event.tokens
                if event.error is not None:
                    raise refused(500, event.error, "generation_failed")
                if event.completion is not None and event.completion.finish_reason == "cancelled":
                    raise refused(503, "the log-probabilities of the prompt did not end in time", "timeout")
    finally:
        for submission in submissions:
            submission.cancel()
    for part in parts:
        part.scores = scored_prompt(part.prompt.ids, [])[:1] if len(part.prompt.ids) == 1 else None
    for part, tokens in zip(wanted, emitted, strict=True):
        part.scores = scored_prompt(part.prompt.ids, tokens)


def scoring_request(request: Request) -> Request:
    """A request whose emitted tokens' log-probabilities are those of the tokens of another one's prompt.

    It runs in the other one's mode, so that threshold mode's exits are scored. Speculative mode's output is full
    mode's. A certificate does not cover it, so that a request under one is scored in full mode.
    """
    ids = request.prompt
    assert not isinstance(ids, str)
    early = request.mode == "threshold" and request.coverage is None
    changes = {
        "prompt": ids[:1],
        "forced_ids": ids[1:],
        "forced_chunk": MAX_DRAFT + 1,
        "max_tokens": len(ids) - 1,
        "mode": "threshold" if early else "full",
        "samples": 1,
        "sampling": Sampling(),  # log-probabilities do not depend on it
        "stop": (),
        "stop_ids": (),
        "coverage": None,
    }
    return request.model_copy(update=changes)


async def merged(
    submissions: Sequence[Submission], note: Callable[[int, Event], None] = lambda index, event: None
) -> AsyncGenerator[tuple[int, Event]]:
    """The events of several submissions as they come, with the submission's index.

    Args:
        submissions: to read; nothing else reads them meanwhile.
        note: called with each event when it is read, which may be before it is yielded.
    """
    if len(submissions) == 1:
        async for event in submissions[0]:
            note(0, event)
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue(MERGED_EVENTS)

    async def read(index: int, submission: Submission) -> None:
        async for event in submission:
            note(index, event)
            await queue.put((index, event))
        await queue.put((index, None))

    readers = [asyncio.create_task(read(index, submission)) for index, submission in enumerate(submissions)]
    try:
        left = len(readers)
        while left:
            index, given = await queue.get()
            if given is None:
                left -= 1
            else:
                yield index, given
    finally:
        for reader in readers:
            reader.cancel()
