"""Evaluates tasks: which settings are compared, and the way from records to results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_ee.checkpoint.journal import Journal
from megatron_ee.config.validation import validated
from megatron_ee.errors import common_error, shown
from megatron_ee.evaluation.tasks.answers import BATCH, MAX_TOKENS, Setting, answer_records
from megatron_ee.evaluation.tasks.choices import score_choices
from megatron_ee.evaluation.tasks.records import TaskRecord
from megatron_ee.evaluation.tasks.results import BASELINE, TaskResults, make_results, score_rows
from megatron_ee.inference.certificate import Calibration
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.policy import POLICIES
from megatron_ee.inference.released import Released

THRESHOLDS = (0.6, 0.8, 0.9, 0.95)
CALIBRATED = "calibrated"
"""Name of the setting of a certificate."""


def compared_settings(
    released: Released,
    thresholds: Sequence[float] = THRESHOLDS,
    policies: Sequence[str] = ("threshold",),
    *,
    max_tokens: int = MAX_TOKENS,
    stop: Sequence[str] = (),
) -> list[Setting]:
    """Full mode, and with exits speculative mode and threshold mode with each policy at each threshold.

    Args:
        released: the model and its exits.
        thresholds: of threshold mode; each counts once, from low to high.
        policies: names of policies with a threshold; ``gate`` uses the exits that have a gate.
        max_tokens: see ``Setting``.
        stop: see ``Setting``.

    Raises:
        ConfigError: a threshold is not above 0, or no exit has a gate.
    """
    limits: dict[str, Any] = {"max_tokens": max_tokens, "stop": tuple(stop)}
    settings = [Setting(BASELINE, **limits)]
    num_layers = released.model.architecture.num_layers
    if any(spec.layer < num_layers for spec in released.exits):  # others cannot draft
        settings.append(Setting("speculative", "speculative", **limits))
    if not released.exits:
        return settings
    for name in dict.fromkeys(policies):
        gated = POLICIES[name].gated
        exits = tuple(spec.layer for spec in released.exits if spec.gate) if gated else None
        if exits == ():
            raise common_error(f"--policy: no exit has a gate, which {name} needs; tune exits with gate: true")
        for threshold in sorted(set(thresholds)):
            if not threshold > 0:
                raise common_error(f"--thresholds: must be above 0, not {threshold:g}")
            policy = validated(POLICIES[name], {"threshold": threshold}, where="--thresholds")
            label = repr(float(threshold)).removesuffix(".0")  # all digits: answers are kept by the setting's name
            settings.append(Setting(f"{name} {label}", "threshold", policy, exits, **limits))
    return settings


def calibrated_setting(
    calibration: Calibration, full: Setting, records: Sequence[TaskRecord], *, chat: bool
) -> Setting:
    """The setting that a certificate gives answers of the length and stop strings of ``full``.

    With thresholds by group, each record runs under those of its own group, and in full mode where there are none.

    Args:
        calibration: the certificate, for the model.
        full: full mode's setting.
        records: at least one.
        chat: whether prompts go through the chat template.

    Raises:
        ConfigError: the certificate does not cover such answers, or has no thresholds.
    """
    setting = Setting(CALIBRATED, "threshold", max_tokens=full.max_tokens, stop=full.stop)
    by_group = calibration.certificate.per_group == "own"
    groups = sorted({record.group for record in records if record.group is not None}) if by_group else [None]
    if not groups:
        raise common_error(
            f"--calibration: {calibration.path} has thresholds by group, and no record of --tasks has a group; give "
            "them the field group"
        )
    plain = setting.request(records[0].prompt_ids)
    requests = {group: calibration.apply(plain, chat=chat, group=group) for group in groups}
    early = {
        group: replace(setting, policy=request.policy, exits=request.exits)
        for group, request in requests.items()
        if request.mode == "threshold"
    }
    if not early:
        coverage = requests[groups[0]].coverage
        reason = None if coverage is None else coverage.reason
        raise common_error(f"--calibration: {calibration.path} answers in full mode here: {reason}")
    if not by_group:
        return early[None]
    return replace(setting, groups={group: each for group, each in early.items() if group is not None})


def in_full_mode(setting: Setting, records: Sequence[TaskRecord]) -> str | None:
    """A line about the records that a setting by group runs in full mode; None if there are none."""
    others = [record.group for record in records if setting.groups and record.group not in setting.groups]
    if not others:
        return None
    names = ", ".join("(none)" if group is None else shown(group) for group in dict.fromkeys(others))
    return (
        f"{setting.name}: {len(others)} of {len(records)} records run in full mode: there are no thresholds for their "
        f"group: {names}"
    )


def evaluate_tasks(
    engine: Engine,
    records: Sequence[TaskRecord],
    settings: Sequence[Setting],
    journal: Journal | None = None,
    *,
    batch: int = BATCH,
) -> TaskResults:
    """Answer the records and score their choices in every setting, and compare with full mode.

    Records that have choices and no references are not answered in words.

    Arguments and errors as for ``answer_records``; the first setting is full mode, named ``BASELINE``.
    """
    worded = [record for record in records if record.references or not record.choices]
    answers = answer_records(engine, worded, settings, journal, batch=batch)
    choices = score_choices(engine, records, settings, journal, batch=batch)
    return make_results(settings, score_rows(records, answers.by_setting, choices), answers.blocks)
