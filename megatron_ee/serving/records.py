"""What is kept of a request that has ended: its audit, a line of the exit log, and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ee.inference.requests import Completion
from megatron_ee.serving.exit_log import ExitRecord, Status, exit_statistics, now_utc
from megatron_ee.serving.service import Service
from megatron_ee.serving.translate import Prompt

if TYPE_CHECKING:
    from megatron_ee.serving.rules import Decision


@dataclass(frozen=True)
class Ended:
    """One prompt whose outputs have all ended.

    Attributes:
        id: of the answer; with the prompt's index if there are several.
        number: of the request in the order of admission.
        wall: time of its admission, in Unix seconds.
        seconds: from then to its end.
        key: name of the API key; None without keys.
        status: see ``ExitRecord``.
        decision: of the server's rules.
        prompt: the prompt.
        completions: of its outputs; those that failed are missing.
        audited: whether it was drawn for an audit.
    """

    id: str
    number: int
    wall: float
    seconds: float
    key: str | None
    status: Status
    decision: Decision
    prompt: Prompt
    completions: Sequence[Completion]
    audited: bool


async def record_end(service: Service, ended: Ended) -> None:
    """Count a request and write its record, after its audit if it was drawn for one."""
    decision, request = ended.decision, ended.decision.request
    values = exit_statistics(ended.completions, service.loop.num_layers)
    values["prompt_tokens"] = len(ended.prompt.ids)
    record = ExitRecord(
        number=ended.number,
        id=ended.id,
        time=now_utc(ended.wall),
        key=ended.key,
        task=decision.task,
        mode=request.mode,
        policy=None if request.mode == "full" else decision.policy,
        tier=decision.tier,
        status=ended.status,
        seconds=ended.seconds,
        calibration=request.coverage,
        prompt=ended.prompt.text,
        text=tuple(each.text for each in ended.completions),
        **values,
    )
    service.metrics.request(record)
    if service.auditor is not None and ended.audited:
        result = await service.auditor.audit(ended.number, ended.completions)
        if result is not None:
            service.metrics.audit(result.task, result.audit.loss, agrees=result.agrees)
            record = record.model_copy(update={"audit": result.audit})
    if service.exit_log is not None and not service.exit_log.write(record):
        service.metrics.lost_record()
