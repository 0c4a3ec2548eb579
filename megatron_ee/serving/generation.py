"""One HTTP request from its arrival to the record of its end: what it asks of the engine, and what comes back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_ee.errors import ConfigError
from megatron_ee.inference.requests import Completion, Event
from megatron_ee.serving.api.errors import ApiError, failure_of
from megatron_ee.serving.api.logprobs import ScoredToken
from megatron_ee.serving.api.prompts import Prompt
from megatron_ee.serving.api.translate import Generation, renamed
from megatron_ee.serving.exit_record import ExitRecord, Status, exit_statistics, now_utc
from megatron_ee.serving.metrics import request_figures
from megatron_ee.serving.prompt_scores import score_prompts
from megatron_ee.serving.service import Service
from megatron_ee.serving.submission import Submission, merged

if TYPE_CHECKING:
    from megatron_ee.serving.access import Key
    from megatron_ee.serving.limits import Grant
    from megatron_ee.serving.rules.rules import Decision

_CUT_OFF: dict[int | None, Status] = {None: "cancelled", 503: "cancelled", 504: "timeout"}
"""Status of a request whose scoring ended with an HTTP status; None if its client left."""
END_SECONDS = 60.0
"""Seconds for a cancelled request to end, before it is recorded without its last tokens."""


@dataclass
class PromptRun:
    """One prompt in the engine.

    Attributes:
        prompt: the prompt.
        decision: of the server's rules, with the request as it runs.
        number: of the request in the order of admission; None before the engine has admitted it, or has scored its
            prompt if no token is wanted.
        audited: whether it was drawn for an audit.
        scores: the prompt's tokens with their log-probabilities, if they were asked for.
        submission: None before its admission, and if no token is wanted.
        ended: completions of its outputs, by sample; those that failed are missing.
        error: of its outputs that failed, one of them.
        emitted: number of tokens that have been read, by sample.
        cut_off: how it ended if its prompt was not scored to the end.
    """

    prompt: Prompt
    decision: Decision
    number: int | None = None
    audited: bool = False
    scores: list[ScoredToken] = field(default_factory=list)
    submission: Submission | None = None
    ended: dict[int, Completion] = field(default_factory=dict)
    error: str | None = None
    emitted: Counter[int] = field(default_factory=Counter)
    cut_off: Status | None = None

    @property
    def completions(self) -> list[Completion]:
        """Of its outputs that have ended, in their order."""
        return [self.ended[sample] for sample in sorted(self.ended)]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of its outputs, also of those that failed."""
        failed = sum(count for sample, count in self.emitted.items() if sample not in self.ended)
        return failed + sum(len(each.tokens) for each in self.completions)

    @property
    def unfinished(self) -> bool:
        """Whether outputs have not ended."""
        return len(self.ended) < self.decision.request.samples

    @property
    def status(self) -> Status:
        """How it ended, once it has."""
        if self.cut_off is not None:
            return self.cut_off
        if self.submission is not None and self.submission.timed_out:
            return "timeout"
        if self.error is not None:
            return "error"
        return "cancelled" if any(each.finish_reason == "cancelled" for each in self.completions) else "ok"

    @property
    def has_run(self) -> bool:
        """Whether it was more than refused: the engine has read its prompt, or needed not to."""
        return self.number is not None or bool(self.scores) or bool(self.emitted)

    def take(self, event: Event) -> None:
        """Note an event."""
        self.emitted[event.sample] += len(event.tokens)
        if event.completion is not None:
            self.ended[event.sample] = event.completion
        if event.error is not None:
            self.error = event.error


class GenerationRun:
    """An HTTP request whose prompts the engine has accepted.

    Attributes:
        id: of the response.
        generation: what was asked for.
        parts: one per prompt.
        created: when it came, in Unix seconds.
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
        self.id, self.generation, self.parts = id_, generation, parts
        self._service, self._key, self._grant = service, key, grant
        self._started, self.created = time.perf_counter(), time.time()
        self._ended = False

    @property
    def seconds(self) -> float:
        """Seconds since it came."""
        return time.perf_counter() - self._started

    @property
    def completions(self) -> list[Completion]:
        """All that have ended, in the order of the response's choices."""
        return [completion for part in self.parts for completion in part.completions]

    def part(self, index: int) -> PromptRun:
        """The prompt of a choice."""
        return self.parts[index // self.generation.samples]

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """The events of all outputs with the indices of their choices, until all have ended.

        Raises:
            ApiError: an output failed, the deadline has come, or the server is stopping.
        """
        submissions = [part.submission for part in self.parts if part.submission is not None]
        deadline = self._service.limits.deadline
        async with aclosing(merged(submissions, lambda index, event: self.parts[index].take(event))) as events:
            async for index, event in events:
                if (failure := failure_of(event, submissions[index], deadline)) is not None:
                    raise failure
                yield index * self.generation.samples + event.sample, event

    def end(self) -> None:
        """Note that the HTTP request has ended, however it did. Whatever still runs is cancelled."""
        if self._ended:
            return
        self._ended = True
        task = asyncio.get_running_loop().create_task(self._finish())
        self._service.background_tasks.add(task)
        task.add_done_callback(self._service.background_tasks.discard)

    async def _finish(self) -> None:
        """Cancel what still runs, wait for its end, and record the request."""
        running = [part for part in self.parts if part.submission is not None and part.unfinished]
        for part in running:
            assert part.submission is not None
            part.submission.cancel()
        for part in running:  # also where one output failed: the others have tokens
            await _read_rest(part)
        used = 0
        if any(part.has_run for part in self.parts):  # not if the queue was full
            used = sum(len(part.prompt.ids) + part.num_tokens for part in self.parts)
        self._service.access.settle(self._key, self._grant, used)
        seconds = self.seconds
        ids = [self.id if len(self.parts) == 1 else f"{self.id}-{index}" for index in range(len(self.parts))]
        # Together: an audit may take minutes, and neither the other records nor the other audits depend on it.
        await asyncio.gather(
            *(
                self._record(part, part.number, id_, seconds)
                for part, id_ in zip(self.parts, ids, strict=True)
                if part.number is not None
            )
        )

    async def _record(self, part: PromptRun, number: int, id_: str, seconds: float) -> None:
        """Count a prompt that has ended and write its record, if it was drawn for an audit when that is counted."""
        service, decision, request = self._service, part.decision, part.decision.request
        values = exit_statistics(part.completions)
        values["prompt_tokens"] = len(part.prompt.ids)
        if part.submission is None and part.status == "ok":  # no token was wanted, so that none is missing
            values["finish_reason"] = "length"
        record = ExitRecord(
            number=number,
            id=id_,
            time=now_utc(self.created),
            key=None if self._key is None else self._key.name,
            task=decision.task,
            mode=request.mode,
            policy=None if request.mode == "full" else decision.policy,
            tier=decision.tier,
            status=part.status,
            num_layers=service.engine_loop.num_layers,
            seconds=seconds,
            calibration=request.coverage,
            prompt=part.prompt.text,
            text=tuple(each.text for each in part.completions),
            **values,
        )
        intervals = () if part.submission is None else part.submission.intervals
        service.metrics.request(record, request_figures(request, part.completions, intervals))
        if service.auditor is not None and part.audited:
            result = await service.auditor.audit(number, part.completions)
            if result is not None:
                service.metrics.audit(result.task, result.audit.loss, agrees=result.agrees)
                record = record.model_copy(update={"audit": result.audit})
        if service.exit_log is not None and not service.exit_log.write(record):
            service.metrics.lost_record()


async def _read_rest(part: PromptRun) -> None:
    """Read the events that a cancelled request still has."""
    assert part.submission is not None
    try:
        async with asyncio.timeout(END_SECONDS):
            async for event in part.submission:
                part.take(event)
    except TimeoutError:
        part.error = part.error or "it did not end after it was cancelled"


async def admit(service: Service, generation: Generation, key: Key | None, id_: str) -> GenerationRun:
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
        raise renamed(error, generation.policy_field) from None
    grant = service.access.take(key, generation.most_tokens)
    parts = [PromptRun(prompt, decision) for prompt, decision in zip(generation.prompts, decisions, strict=True)]
    run = GenerationRun(service, generation, key, grant, parts, id_)
    deadline = service.limits.deadline
    try:
        if generation.scores_prompts:
            await _score(service, parts, deadline)
            if deadline is not None:  # scoring is part of the request
                deadline = max(deadline - run.seconds, 0.0)
        if generation.max_tokens == 0:
            _number(service, parts)
        else:
            submissions: list[Submission] = []
            for part in parts:
                part.submission = service.engine_loop.submit(
                    part.decision.request, deadline=deadline, streamed=generation.stream, more=bool(submissions)
                )
                submissions.append(part.submission)
            for part, submission in zip(parts, submissions, strict=True):
                await submission.admitted()
                part.number = next(service.numbers)
                part.audited = service.auditor is not None and service.auditor.draw(part.decision, part.number)
    except ConfigError as error:
        run.end()
        raise renamed(error, generation.policy_field) from None
    except BaseException:
        run.end()
        raise
    return run


async def _score(service: Service, parts: Sequence[PromptRun], deadline: float | None) -> None:
    """Compute the log-probabilities of the prompts. If that is cut off, the request is recorded all the same."""
    requests = [part.decision.request for part in parts]
    try:
        for part, scores in zip(parts, await score_prompts(service.engine_loop, requests, deadline), strict=True):
            part.scores = scores
    except (ApiError, asyncio.CancelledError) as error:  # what was refused raises others
        status = error.status if isinstance(error, ApiError) else None
        for part in parts:
            part.cut_off = _CUT_OFF.get(status, "error")
        _number(service, parts)
        raise


def _number(service: Service, parts: Sequence[PromptRun]) -> None:
    """Number prompts of which no token is wanted or none will come. They are not drawn for audits."""
    for part in parts:
        part.number = next(service.numbers)
