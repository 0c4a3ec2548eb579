"""Groups of the records of tasks: what threshold mode does for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Literal, get_args

import numpy as np

from megatron_ee.evaluation.calibration.pvalues import largest_risk
from megatron_ee.evaluation.groups.compare import LOSS, EarlyResults, GroupComparison, compare_groups
from megatron_ee.evaluation.groups.prompts import length_bucket, script
from megatron_ee.evaluation.tasks.agreement import loss_of
from megatron_ee.evaluation.tasks.records import TaskRecord
from megatron_ee.evaluation.tasks.results import BASELINE, PREFERRED_QUALITY, TaskResults, TaskRow
from megatron_ee.evaluation.tasks.run import CALIBRATED
from megatron_ee.inference.certificate import Certificate

By = Literal["group", "script", "length"]
WORDS: Mapping[By, str] = {"group": "group", "script": "script", "length": "tokens of the prompt"}
assert set(WORDS) == set(get_args(By))
NO_GROUP = "(none)"
"""Group of the records that name none."""


def group_name(record: TaskRecord, by: By) -> str:
    """The group of a record: its own, or by its prompt."""
    if by == "group":
        return record.group or NO_GROUP
    if by == "length":
        return length_bucket(len(record.prompt_ids))
    if record.messages is None:
        return script(record.prompt or "")
    return script(" ".join(str(each["content"]) for each in record.messages if each["role"] == "user"))


def compare_task_groups(
    results: TaskResults,
    by: By,
    certificate: Certificate | None = None,
    *,
    calibrated_here: bool = False,
    seed: int = 0,
) -> dict[str, GroupComparison]:
    """The groups in each setting of threshold mode, by the setting's name.

    Args:
        results: of all settings.
        by: what makes the groups.
        certificate: its loss is a measure, too, and the expected loss of each group gets an upper bound.
        calibrated_here: the certificate was calibrated on these records. They chose its setting, which gets no bounds.
        seed: of all that is random.
    """
    full = results.rows[BASELINE]
    names = [group_name(row.record, by) for row in full]
    settings = [setting.name for setting in results.settings if setting.mode == "threshold"]
    measured = {name: early_results(results.rows[name], full, certificate) for name in settings}
    compared = compare_groups(measured, names, WORDS[by], seed=seed)
    if certificate is not None:
        for setting in settings:
            if not (calibrated_here and setting == CALIBRATED):
                compared[setting] = _bounded(compared[setting], measured[setting], names, certificate, seed)
    return compared


def early_results(
    early: Sequence[TaskRow], full: Sequence[TaskRow], certificate: Certificate | None = None
) -> EarlyResults:
    """The rows of a setting beside full mode's, of the same records in the same order."""
    losses = None
    if certificate is not None:
        losses = np.array([_loss(*pair, certificate) for pair in zip(early, full, strict=True)])
    return EarlyResults(
        layers=np.array([_layers(row) for row in early]),
        agreement=np.array([row.scores.get("equal_tokens", math.nan) for row in early]),
        early_quality=np.array([_quality(row) for row in early]),
        full_quality=np.array([_quality(row) for row in full]),
        losses=losses,
    )


def _bounded(
    found: GroupComparison, results: EarlyResults, names: Sequence[str], certificate: Certificate, seed: int
) -> GroupComparison:
    """The comparison with upper bounds of the losses, each at delta / number of groups, so that all hold together."""
    assert results.losses is not None
    bounded = [group.name for group in found.groups if LOSS in group.figures]
    rng, bounds = np.random.default_rng(seed), {}
    for name in bounded:
        own = results.losses[np.array(names) == name]
        own = rng.permutation(own[~np.isnan(own)])
        bounds[name] = largest_risk(certificate.p_value, own, certificate.delta / len(bounded))
    groups = tuple(replace(group, largest_loss=bounds.get(group.name)) for group in found.groups)
    return replace(found, groups=groups, certified=(certificate.risk, certificate.delta))


def _loss(early: TaskRow, full: TaskRow, certificate: Certificate) -> float:
    """The certificate's loss of a row; NaN if it has no answer, or no references that its loss needs."""
    references = early.record.references
    if early.answer is None or full.answer is None or (certificate.loss == "quality" and not references):
        return math.nan
    return loss_of(certificate.loss, certificate.metric or "", early.answer, full.answer, references)


def _layers(row: TaskRow) -> float:
    return math.nan if row.answer is None else fmean(row.answer.layers)


def _quality(row: TaskRow) -> float:
    return next((row.scores[name] for name in PREFERRED_QUALITY if name in row.scores), math.nan)
