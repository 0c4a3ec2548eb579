"""One audit on the engine: the answer of a request again in full mode, and the loss of the early one against it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ee.errors import UserError
from megatron_ee.evaluation.tasks.agreement import loss_of
from megatron_ee.evaluation.tasks.answers import TaskAnswer
from megatron_ee.inference.certificate import Certificate
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Completion, Request

if TYPE_CHECKING:
    from megatron_ee.serving.engine_loop import EngineLoop

RETRY_SECONDS = 1.0
"""Seconds before an audit asks a full queue again."""


class ServerEnds(Exception):
    """The server ends, so the audit cannot be finished."""


@dataclass(frozen=True)
class Comparison:
    """An early answer against full mode's.

    Attributes:
        loss: as the certificate defines it, in [0, 1].
        agrees: whether it is full mode's, token by token.
        failed: whether there was no answer to compare with; the loss is then 1.
    """

    loss: float
    agrees: bool
    failed: bool = False


async def compare(
    engine_loop: EngineLoop, certificate: Certificate, request: Request, early: Sequence[Completion], patience: float
) -> Comparison:
    """Run a request in full mode, and compare.

    Args:
        engine_loop: runs it in the background.
        certificate: that it ran under.
        request: as it ran.
        early: its outputs, in their order. If one is missing, failed or was cancelled, all are generated again.
        patience: seconds that it waits for an idle engine before it runs like any other request.

    Raises:
        ServerEnds: before the end of the audit.
    """
    plain = request.model_copy(update={"echo": False, "logprobs": None, "coverage": None})
    exact = plain.model_copy(update={"mode": "full", "policy": ThresholdPolicy(), "exits": None})
    mine = _answers(early, plain.samples) or _answers(await _run(engine_loop, plain, patience), plain.samples)
    full = _answers(await _run(engine_loop, exact, patience), plain.samples) if mine else ()
    if not mine or not full:
        return Comparison(1.0, agrees=False, failed=True)
    pairs = list(zip(mine, full, strict=True))
    losses = [loss_of(certificate.loss, certificate.metric or "", one, other, ()) for one, other in pairs]
    return Comparison(sum(losses) / len(losses), all(one.token_ids == other.token_ids for one, other in pairs))


async def _run(engine_loop: EngineLoop, request: Request, patience: float) -> list[Completion]:
    """The outputs of a request, in their order; fewer if one failed."""
    found = await _run_once(engine_loop, request, patience)
    while found is None:
        found = await _run_once(engine_loop, request, None)
        if found is None:
            await asyncio.sleep(RETRY_SECONDS)
    return found


async def _run_once(engine_loop: EngineLoop, request: Request, patience: float | None) -> list[Completion] | None:
    """As ``_run``, in the background if there is ``patience``; None if it has not started, as the engine is busy."""
    try:
        submission = engine_loop.submit(request, background=patience is not None)
    except UserError:
        _check_going_on(engine_loop)
        return None
    found: dict[int, Completion] = {}
    try:
        async with asyncio.timeout(patience):
            await submission.admitted()
        async for event in submission:
            if event.completion is not None:
                found[event.sample] = event.completion
    except TimeoutError:
        submission.cancel()
        return None
    except UserError:  # the engine refuses it, now and later
        _check_going_on(engine_loop)
        return []
    except asyncio.CancelledError:
        submission.cancel()
        raise
    if len(found) < request.samples or any(each.finish_reason == "cancelled" for each in found.values()):
        _check_going_on(engine_loop)  # the end of the server cancels requests
    return [found[sample] for sample in sorted(found)]


def _check_going_on(engine_loop: EngineLoop) -> None:
    """Find out why the engine did not take or finish a request.

    Raises:
        ServerEnds: the server ends.
    """
    if not engine_loop.state().ready:
        raise ServerEnds


def _answers(completions: Sequence[Completion], samples: int) -> tuple[TaskAnswer, ...]:
    """Outputs as the losses read them; none if one is missing or was cut off."""
    if len(completions) != samples or any(each.finish_reason == "cancelled" for each in completions):
        return ()
    return tuple(
        TaskAnswer(
            text="".join(each.pieces),  # without the prompt, which the text may begin with
            token_ids=tuple(token.id for token in each.tokens),
            layers=(),
            confidences=(),
            layers_per_token=None,
            finish_reason=each.finish_reason,
            seconds=0.0,
        )
        for each in completions
    )
