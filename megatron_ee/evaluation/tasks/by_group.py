"""Groups of the records of tasks: what threshold mode does for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal, get_args

import numpy as np

from megatron_ee.evaluation.groups import EarlyResults, GroupComparison, compare_groups
from megatron_ee.evaluation.prompt_groups import length_bucket, script
from megatron_ee.evaluation.tasks.records import TaskRecord
from megatron_ee.evaluation.tasks.results import BASELINE, TaskResults, TaskRow

By = Literal["group", "script", "length"]
WORDS: Mapping[By, str] = {"group": "group", "script": "script", "length": "tokens of the prompt"}
assert set(WORDS) == set(get_args(By))
NO_GROUP = "(none)"
"""Group of the records that name none."""
QUALITY = ("contains", "accuracy")
"""Scores that are taken as quality, the first that a record has."""
AGREEMENT = "equal_tokens"


def group_name(record: TaskRecord, by: By) -> str:
    """The group of a record: its own, or by its prompt."""
    if by == "group":
        return record.group or NO_GROUP
    if by == "length":
        return length_bucket(len(record.prompt_ids))
    if record.messages is None:
        return script(record.prompt or "")
    return script(" ".join(str(each["content"]) for each in record.messages if each["role"] == "user"))


def compare_task_groups(results: TaskResults, by: By) -> dict[str, GroupComparison]:
    """The groups in each setting of threshold mode, by the setting's name."""
    full = results.rows[BASELINE]
    names = [group_name(row.record, by) for row in full]
    return {
        setting.name: compare_groups(early_results(results.rows[setting.name], full), names, WORDS[by])
        for setting in results.settings
        if setting.mode == "threshold"
    }


def early_results(early: Sequence[TaskRow], full: Sequence[TaskRow]) -> EarlyResults:
    """The rows of a setting beside full mode's, of the same records in the same order."""
    return EarlyResults(
        layers=np.array([_layers(row) for row in early]),
        agreement=np.array([row.scores.get(AGREEMENT, math.nan) for row in early]),
        early_quality=np.array([_quality(row) for row in early]),
        full_quality=np.array([_quality(row) for row in full]),
    )


def _layers(row: TaskRow) -> float:
    return math.nan if row.answer is None else fmean(row.answer.layers)


def _quality(row: TaskRow) -> float:
    return next((row.scores[name] for name in QUALITY if name in row.scores), math.nan)
