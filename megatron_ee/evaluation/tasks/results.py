"""From answers to figures: scores of each row, and their means per setting, beside full mode's.

``score_rows`` scores every record in every setting. ``summarise`` gives the means of any of these rows: of a task, of a
group, or of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from megatron_ee.evaluation.statistics import paired_intervals
from megatron_ee.evaluation.tasks.agreement import TokenAgreement, compare_tokens
from megatron_ee.evaluation.tasks.answers import WARM_UP_TOKENS, Setting, TaskAnswer, TimedBlock
from megatron_ee.evaluation.tasks.choices import ChoiceScores
from megatron_ee.evaluation.tasks.metrics import METRICS
from megatron_ee.evaluation.tasks.records import TaskRecord

BASELINE = "full"
"""Name of the setting that the others are compared with."""
QUALITY = (*METRICS, "accuracy", "accuracy_per_character")
PREFERRED_QUALITY = ("contains", "accuracy")
"""Scores that are taken as quality where one is wanted, the first that there is."""
AGREEMENT_SCORES = ("equal_answers", "tokens_before_departure", "equal_tokens")
"""Scores that compare an answer with the baseline's, which has 1."""
CUT = ("length", "context")
"""Reasons to end an answer that are not the model's own."""


@dataclass(frozen=True)
class TaskRow:
    """One record in one setting.

    Attributes:
        record: the record.
        scores: those of ``QUALITY`` and ``AGREEMENT_SCORES`` that it has, each in [0, 1].
        answer: None for a record that was not answered, since it has choices alone.
        agreement: with the baseline's answer; None without an answer.
    """

    record: TaskRecord
    scores: Mapping[str, float]
    answer: TaskAnswer | None
    agreement: TokenAgreement | None


@dataclass(frozen=True)
class MeanScore:
    """Mean of a score over the rows that have it, against the baseline's.

    Attributes:
        rows: number of rows.
        mean: in [0, 1].
        difference: mean minus the baseline's mean.
        low: lower end of the 95% interval of the difference.
        high: upper end.
    """

    rows: int
    mean: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """Speed of a setting on timed blocks.

    Attributes:
        rows: number of rows that were timed.
        tokens_per_second: emitted tokens per second, with the passes of the prompts.
        speedup: ``tokens_per_second`` over the baseline's.
    """

    rows: int
    tokens_per_second: float
    speedup: float


@dataclass(frozen=True)
class SettingResult:
    """One setting on some rows.

    Attributes:
        setting: its name.
        rows: number of rows.
        scores: by name, those that some rows have.
        mean_departure: mean index of the first token that is not the baseline's, over the answers that have one; None
            without such an answer.
        tokens: mean number of tokens per answer; None without answers.
        cut: share of the answers that ``max_tokens`` or the end of the context cut; None without answers.
        exit_layer: mean layer of the exits that emitted the tokens; None without answers.
        layers_per_token: decoder layers run per token after the first of each answer, with those that tokens which left
            early run later; None without such tokens.
        speed: None if no block was timed.
    """

    setting: str
    rows: int
    scores: Mapping[str, MeanScore]
    mean_departure: float | None
    tokens: float | None
    cut: float | None
    exit_layer: float | None
    layers_per_token: float | None
    speed: Speed | None

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON types."""
        return dataclasses.asdict(self)


def score_rows(
    records: Sequence[TaskRecord],
    answers: Mapping[str, Mapping[str, TaskAnswer]],
    choices: Mapping[str, Mapping[str, ChoiceScores]],
) -> dict[str, list[TaskRow]]:
    """The rows of each setting, in the order of the records.

    Args:
        records: all records.
        answers: by the setting's name and the record's id.
        choices: likewise, for the records with choices.
    """
    return {
        name: [
            _row(record, own.get(record.id), answers[BASELINE].get(record.id), choices[name].get(record.id))
            for record in records
        ]
        for name, own in answers.items()
    }


def _row(
    record: TaskRecord, answer: TaskAnswer | None, baseline: TaskAnswer | None, choices: ChoiceScores | None
) -> TaskRow:
    scores: dict[str, float] = {}
    agreement = None
    if answer is not None and baseline is not None:
        agreement = compare_tokens(answer.token_ids, baseline.token_ids)
        if record.references:
            scores |= {name: metric(answer.text, record.references) for name, metric in METRICS.items()}
        scores |= {
            "equal_answers": float(agreement.equal),
            "tokens_before_departure": agreement.before,
            "equal_tokens": agreement.equal_tokens,
        }
    if choices is not None:
        scores |= {
            "accuracy": choices.accuracy(record),
            "accuracy_per_character": choices.accuracy_per_character(record),
        }
    return TaskRow(record, scores, answer, agreement)


def summarise(
    rows: Mapping[str, Sequence[TaskRow]], blocks: Sequence[TimedBlock] = (), *, seed: int = 0
) -> tuple[SettingResult, ...]:
    """The result of each setting.

    Args:
        rows: by the setting's name, with the baseline's; of the same records in the same order.
        blocks: the timed blocks of these records; none for no speed.
        seed: of the intervals.
    """
    means: dict[str, dict[str, MeanScore]] = {name: {} for name in rows}
    for score in (*QUALITY, *AGREEMENT_SCORES):
        having = [place for place, row in enumerate(rows[BASELINE]) if score in row.scores]
        if not having:
            continue
        values = np.array([[rows[name][place].scores[score] for name in rows] for place in having])
        differences = values - values[:, [list(rows).index(BASELINE)]]
        ends = paired_intervals(differences, seed=seed)
        for name, mean, difference, (low, high) in zip(
            rows, values.mean(0).tolist(), differences.mean(0).tolist(), ends.tolist(), strict=True
        ):
            means[name][score] = MeanScore(len(having), mean, difference, low, high)
    return tuple(_result(name, own, means[name], _speed(name, blocks)) for name, own in rows.items())


def _result(name: str, rows: Sequence[TaskRow], scores: Mapping[str, MeanScore], speed: Speed | None) -> SettingResult:
    answers = [row.answer for row in rows if row.answer is not None]
    departures = [
        row.agreement.departure for row in rows if row.agreement is not None and row.agreement.departure is not None
    ]
    return SettingResult(
        setting=name,
        rows=len(rows),
        scores=scores,
        mean_departure=fmean(departures) if departures else None,
        tokens=fmean(len(each.token_ids) for each in answers) if answers else None,
        cut=fmean(each.finish_reason in CUT for each in answers) if answers else None,
        exit_layer=fmean(layer for each in answers for layer in each.layers) if answers else None,
        layers_per_token=layers_per_token(answers),
        speed=speed,
    )


def layers_per_token(answers: Iterable[TaskAnswer]) -> float | None:
    """Decoder layers run per token after the first of each answer; None if there are no such tokens."""
    pairs = [(each.layers_per_token, len(each.token_ids) - 1) for each in answers if each.layers_per_token is not None]
    count = sum(later for _, later in pairs)
    return sum(layers * later for layers, later in pairs) / count if count else None


def _speed(name: str, blocks: Sequence[TimedBlock]) -> Speed | None:
    if not blocks:
        return None

    def rate(of: str) -> float:
        return sum(block.tokens[of] for block in blocks) / sum(block.seconds[of] for block in blocks)

    return Speed(sum(block.rows for block in blocks), rate(name), rate(name) / rate(BASELINE))


@dataclass(frozen=True)
class TaskResults:
    """All settings on all records.

    Attributes:
        settings: the settings, the baseline first.
        rows: by the setting's name, in the order of the records.
        blocks: the timed blocks.
        overall: the result of each setting on all rows.
        tasks: likewise, by task.
    """

    settings: tuple[Setting, ...]
    rows: Mapping[str, Sequence[TaskRow]]
    blocks: tuple[TimedBlock, ...]
    overall: tuple[SettingResult, ...]
    tasks: Mapping[str, tuple[SettingResult, ...]]

    def to_dict(self) -> dict[str, Any]:
        """The results in JSON types, without the single rows."""
        return {
            "settings": [setting.to_dict() for setting in self.settings],
            "overall": {each.setting: each.to_dict() for each in self.overall},
            "tasks": {task: {each.setting: each.to_dict() for each in found} for task, found in self.tasks.items()},
        }

    def timing(self, batch: int) -> dict[str, Any]:
        """How the speed was measured, in JSON types; ``batch`` is the maximum number of running sequences."""
        return {
            "max_num_seqs": batch,
            "rows": sum(block.rows for block in self.blocks),
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "order": "each block in every setting, in rotating order",
            "warm_up_tokens": WARM_UP_TOKENS,
        }

    def rows_dict(self) -> list[dict[str, Any]]:
        """Each record with its scores in every setting, in JSON types."""
        names = list(self.rows)
        return [
            {**_record_dict(same[0].record), "settings": dict(zip(names, map(_row_dict, same), strict=True))}
            for same in zip(*self.rows.values(), strict=True)
        ]


def make_results(
    settings: Sequence[Setting], rows: Mapping[str, Sequence[TaskRow]], blocks: Sequence[TimedBlock]
) -> TaskResults:
    """Summarise the rows over all and per task."""
    tasks = list(dict.fromkeys(row.record.task for row in rows[BASELINE]))
    per_task = {
        task: summarise(
            {name: [row for row in own if row.record.task == task] for name, own in rows.items()},
            [block for block in blocks if block.task == task],
        )
        for task in tasks
    }
    return TaskResults(tuple(settings), rows, tuple(blocks), summarise(rows, blocks), per_task)


def _record_dict(record: TaskRecord) -> dict[str, Any]:
    """What names a record, and its question and right answers for a reader."""
    named = {"id": record.id, "task": record.task, "group": record.group}
    return {**named, "prompt": record.question, "references": list(record.references)}


def _row_dict(row: TaskRow) -> dict[str, Any]:
    answer = row.answer
    if answer is None:
        return dict(row.scores)
    return {
        **row.scores,
        "departure": None if row.agreement is None else row.agreement.departure,
        "tokens": len(answer.token_ids),
        "mean_exit_layer": fmean(answer.layers),
        "layers_per_token": answer.layers_per_token,
        "finish_reason": answer.finish_reason,
    }
