"""A tuning run's JSONL log: the losses of its steps, and its validations against the tokens that it had seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ee.errors import DataError

Losses = dict[int, dict[int, float]]


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


def read_log(log: str | Path) -> tuple[Losses, Losses]:
    """Losses of a run's JSONL log by step, then by layer: those of steps, and those of validations.

    If a step appears twice, the later line counts. Layer 0 of a validation is the final exit.

    Raises:
        DataError: the log cannot be read, has an invalid line, or has neither steps nor validations.
    """
    steps: Losses = {}
    validations: Losses = {}

    def read(record: dict[str, Any]) -> None:
        if record.get("exits"):
            steps[record["step"]] = _by_layer(record["exits"], "loss")
        if record.get("validation"):
            found = _by_layer(record["validation"]["exits"], "loss")
            final = record["validation"].get("final_loss")
            validations[record["step"]] = found if final is None else {0: final, **found}

    _each_record(log, read)
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

    def read(record: dict[str, Any]) -> None:
        if record.get("free_running"):
            at_end[record["step"]] = _free_running(record["free_running"])
        if record.get("validation") and "tokens_seen" in record:
            measured = record["validation"].get("free_running")
            exits, final = record["validation"]["exits"], record["validation"]["final_loss"]
            found[record["step"]] = Validation(
                record["step"],
                record["tokens_seen"],
                math.nan if final is None else final,
                _by_layer(exits, "loss"),
                _by_layer(exits, "agreement"),
                _by_layer(
                    [{"layer": each["layer"], **each["acceptance"]} for each in exits if each.get("acceptance")],
                    "length",
                ),
                _free_running(measured) if measured else None,
            )

    _each_record(log, read)
    return [
        replace(found[step], free_running=at_end[step]) if step in at_end else found[step] for step in sorted(found)
    ]


def _free_running(measured: dict[str, Any]) -> tuple[float, float]:
    layers = measured["layers_per_token"]
    return measured["agreement"], math.nan if layers is None else layers


def _each_record(log: str | Path, read: Callable[[dict[str, Any]], None]) -> None:
    """Call ``read`` with each line's object. An incomplete last line is ignored."""
    try:
        lines = Path(log).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{log}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            read(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{log}:{number}: not a line of a tuning log: {error!r}") from None


def _by_layer(exits: list[dict[str, Any]], name: str) -> dict[int, float]:
    return {entry["layer"]: math.nan if entry[name] is None else entry[name] for entry in exits}
