"""The record of one request: what early exit did with it. The exit log has one per line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from megatron_ee.evaluation.drift.audits import AuditRecord
from megatron_ee.inference.requests import Completion, Coverage, Mode

BINS = 10
"""Equal bins of confidences, from 0 to 1."""
OTHER = "other"
"""Task of the requests that have none."""
Status = Literal["ok", "error", "cancelled", "timeout"]
Tier = Literal["default", "important"]
Count = Annotated[int, Field(ge=0)]
Layer = Annotated[str, Field(pattern=r"^[0-9]{1,6}$")]
Seconds = Annotated[float, Field(ge=0)]
Bins = Annotated[tuple[Count, ...], Field(strict=False, min_length=BINS, max_length=BINS)]


class ExitRecord(AuditRecord):
    """One request. A request with several outputs has one record, with their sums.

    Attributes:
        number: of the request in the order of admission, from 0. It goes on after a restart of the server.
        id: of the request, as in its answer.
        audit: the result of its audit; None if it was not audited.
        time: of its arrival, ISO 8601 in UTC.
        key: name of the API key, never the key; None without keys.
        task: its task, or ``OTHER``.
        mode: it ran in.
        policy: what set the exits, in a few words; None in full mode.
        tier: ``important`` if it was marked so.
        status: ``ok``; ``error``: the engine failed, or the client read too slowly; ``cancelled``: the client left or
            the server ended; ``timeout``: its deadline came.
        finish_reason: of its first output; None if that has not ended.
        prompt_tokens: of its prompt.
        reused_tokens: of them, those whose KV was copied from another request.
        tokens: of all outputs.
        outputs: their number.
        tokens_by_layer: emitted tokens by the layer that emitted them; the last layer stands for the final exit.
        num_layers: of the model.
        confidences: number of tokens by their confidence, in ``BINS`` equal bins.
        later_tokens: tokens after the first of each output; None in logs of earlier versions.
        layers_per_token: decoder layers run per later token; None without such tokens.
        rounds: of drafting.
        proposed: tokens that exits proposed as drafts, over all rounds.
        accepted: of them, those that the model accepted.
        seconds: from arrival to the end.
        time_to_first_token: in seconds; None without tokens.
        calibration: what a certificate says of the answer; None without one.
        prompt: text of the prompt, only with ``--log-text``.
        text: of the outputs, only with ``--log-text``.
    """

    model_config = ConfigDict(extra="ignore")

    time: str = Field(pattern=r"^\d{4}-\d\d-\d\dT")
    key: str | None = None
    task: str
    mode: Mode
    policy: str | None = None
    tier: Tier = "default"
    status: Status = "ok"
    finish_reason: str | None = None
    prompt_tokens: Count
    reused_tokens: Count = 0
    tokens: Count = 0
    outputs: int = Field(default=1, ge=1)
    tokens_by_layer: Mapping[Layer, Count] = Field(default_factory=dict)
    num_layers: int | None = Field(default=None, ge=1)
    confidences: Bins = (0,) * BINS
    later_tokens: Count | None = None
    layers_per_token: float | None = Field(default=None, ge=0)
    rounds: Count = 0
    proposed: Count = 0
    accepted: Count = 0
    seconds: Seconds
    time_to_first_token: Seconds | None = None
    calibration: Coverage | None = None
    prompt: str | None = None
    text: tuple[str, ...] | None = Field(default=None, strict=False)

    @property
    def day(self) -> str:
        """The UTC day of its arrival, such as ``2026-11-30``."""
        return self.time[:10]


def now_utc(seconds: float | None = None) -> str:
    """A time, by default now, as in ``ExitRecord.time``: ISO 8601 in UTC with milliseconds."""
    at = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def confidence_bins(confidences: Sequence[float]) -> tuple[int, ...]:
    """Number of confidences in each of ``BINS`` equal bins from 0 to 1; 1 is in the last one, NaN in none."""
    counts = [0] * BINS
    for confidence in confidences:
        if not math.isnan(confidence):
            counts[min(max(int(confidence * BINS), 0), BINS - 1)] += 1
    return tuple(counts)


def exit_statistics(completions: Sequence[Completion]) -> dict[str, Any]:
    """The fields of an ``ExitRecord`` that the statistics of its request's outputs give.

    Args:
        completions: the outputs that have ended, in their order, also cancelled ones.
    """
    statistics = [each.statistics for each in completions]
    by_layer: Counter[str] = Counter()
    for each in statistics:
        by_layer.update(each["tokens_by_layer"])
    later, runs = (sum(each[key] for each in statistics) for key in ("later_tokens", "layer_runs"))
    waits = [each["time_to_first_token"] for each in statistics if each["time_to_first_token"] is not None]
    return {
        "finish_reason": completions[0].finish_reason if completions else None,
        "prompt_tokens": statistics[0]["prompt_tokens"] if statistics else 0,
        "reused_tokens": statistics[0]["reused_tokens"] if statistics else 0,
        **{key: sum(each[key] for each in statistics) for key in ("tokens", "rounds", "proposed", "accepted")},
        "outputs": max(len(completions), 1),
        "tokens_by_layer": dict(sorted(by_layer.items(), key=lambda item: int(item[0]))),
        "confidences": confidence_bins([value for each in statistics for value in each["confidences"]]),
        "later_tokens": later,
        "layers_per_token": runs / later if later else None,
        "time_to_first_token": min(waits) if waits else None,
    }
