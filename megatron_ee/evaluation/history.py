"""A tuning run's JSONL log: the losses of its steps, and its validations against the tokens that it had seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from megatron_ee.config.untrusted import parse_json, whole_lines
from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import CheckpointError, DataError, UserError

Losses = dict[int, dict[int, float]]
Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Validation:
    """One validation of a run.

    Attributes:
        step: steps done.
        tokens_seen: labels that the exits had been trained on.
        final_loss: loss of the final exit.
        losses: loss per exit, by layer.
        agreements: share of tokens where the exit's top-1 is the final exit's, by layer.
        acceptance: tokens per round of speculative decoding, by layer; empty if it was not measured.
        free_running: of threshold mode, the share of tokens equal to the full model's, and the layers per token; None
            if it was not measured.
    """

    step: int
    tokens_seen: int
    final_loss: float
    losses: dict[int, float]
    agreements: dict[int, float]
    acceptance: dict[int, float]
    free_running: tuple[float, float] | None = None


class _LinePart(Strict):
    """The part of a log's line that is read. The line may hold more."""

    model_config = ConfigDict(extra="ignore")


class _LoggedExit(_LinePart):
    layer: Count
    loss: float | None


class _Acceptance(_LinePart):
    length: float | None


class _MeasuredExit(_LoggedExit):
    agreement: float | None = None
    acceptance: _Acceptance | None = None


class _FreeRunning(_LinePart):
    agreement: float
    layers_per_token: float | None


class _Measured(_LinePart):
    final_loss: float | None = None
    exits: tuple[_MeasuredExit, ...] = Field(min_length=1, strict=False)
    free_running: _FreeRunning | None = None


class Session(_LinePart):
    """What a process of the run took that ended by itself; see ``RunLog.session``."""

    seconds: float = Field(ge=0)
    processes: Count
    device: str


class LogLine(_LinePart):
    """A line of a run's JSONL log: a step, a validation, a measurement at the end, or a session; see ``RunLog``.

    Attributes:
        step: steps done.
        tokens, tokens_per_second, exits: of a step.
        tokens_seen, validation: of a validation.
        free_running: of threshold mode at the end.
        session: what a process took.
    """

    step: Count
    tokens: Count | None = None
    tokens_per_second: float | None = Field(default=None, ge=0)
    exits: tuple[_LoggedExit, ...] = Field(default=(), strict=False)
    tokens_seen: Count | None = None
    validation: _Measured | None = None
    free_running: _FreeRunning | None = None
    session: Session | None = None


def read_lines(log: str | Path) -> Iterator[LogLine]:
    """The lines of a run's JSONL log, one at a time. A last line that a kill has torn is left out.

    Raises:
        DataError: the log cannot be read or has an invalid line.
    """
    try:
        for where, line in whole_lines(Path(log)):
            values = parse_json(line, where)
            try:
                yield validated(LogLine, values)
            except UserError as error:
                raise DataError(f"{where}: not a line of a tuning log: {error}") from None
    except CheckpointError as error:
        raise DataError(str(error)) from None


def read_log(log: str | Path) -> tuple[Losses, Losses]:
    """Losses of a run's JSONL log by step, then by layer: those of steps, and those of validations.

    If a step appears twice, the later line counts. Layer 0 of a validation is the final exit.

    Raises:
        DataError: the log cannot be read, has an invalid line, or has neither steps nor validations.
    """
    steps: Losses = {}
    validations: Losses = {}
    for line in read_lines(log):
        if line.exits:
            steps[line.step] = {each.layer: _number(each.loss) for each in line.exits}
        if line.validation is not None:
            final = line.validation.final_loss
            found = {each.layer: _number(each.loss) for each in line.validation.exits}
            validations[line.step] = found if final is None else {0: final, **found}
    if not steps and not validations:
        raise DataError(f"{log}: holds no step and no validation yet")
    return steps, validations


def read_validations(log: str | Path) -> list[Validation]:
    """The validations of a run's JSONL log, by step. Older releases did not log ``tokens_seen``; theirs are left out.

    Raises:
        DataError: the log cannot be read or has an invalid line.
    """
    found: dict[int, Validation] = {}
    at_end: dict[int, tuple[float, float]] = {}  # by the step of the exits that were measured
    for line in read_lines(log):
        if line.free_running is not None:
            at_end[line.step] = _free_running(line.free_running)
        if line.validation is not None and line.tokens_seen is not None:
            exits, measured = line.validation.exits, line.validation.free_running
            found[line.step] = Validation(
                line.step,
                line.tokens_seen,
                _number(line.validation.final_loss),
                {each.layer: _number(each.loss) for each in exits},
                {each.layer: _number(each.agreement) for each in exits},
                {each.layer: _number(each.acceptance.length) for each in exits if each.acceptance is not None},
                None if measured is None else _free_running(measured),
            )
    return [
        replace(found[step], free_running=at_end[step]) if step in at_end else found[step] for step in sorted(found)
    ]


def _free_running(measured: _FreeRunning) -> tuple[float, float]:
    return measured.agreement, _number(measured.layers_per_token)


def _number(value: float | None) -> float:
    """A figure of the log, which has null for one that is not finite."""
    return math.nan if value is None else value
