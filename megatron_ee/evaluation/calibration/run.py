"""Calibrates the exits of a loaded engine: full mode's answers, candidate settings, and tests from safe to fast.

The sample has two parts (``sample``). The first chooses the settings (``candidates``), the second tests them
(``pvalues``) on the engine's own answers, until a test fails. So the time goes to settings that pass, and to one that
does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ee.checkpoint.journal import Journal
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError
from megatron_ee.evaluation.calibration.candidates import CandidateSetting, candidate_settings
from megatron_ee.evaluation.calibration.forced_answers import force_answers
from megatron_ee.evaluation.calibration.pvalues import P_VALUES, largest_risk, passing
from megatron_ee.evaluation.calibration.sample import CalibrationPlan, Sample, by_group, scopes_of
from megatron_ee.evaluation.statistics import Floats
from megatron_ee.evaluation.tasks.agreement import loss_of
from megatron_ee.evaluation.tasks.answers import BATCH, Setting, TaskAnswer, TaskAnswers, answer_records
from megatron_ee.evaluation.tasks.metrics import METRICS
from megatron_ee.evaluation.tasks.records import TaskRecord
from megatron_ee.evaluation.tasks.results import BASELINE
from megatron_ee.inference.certificate import ExitScaling, GroupResult, Interval, Tested
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.policy import POLICIES, ExitPolicy

NEVER = 2.0
"""Threshold of the exits that a policy does not use."""
_RESAMPLES = 2000
Records = Sequence[TaskRecord]
Answers = Mapping[str, TaskAnswer]


@dataclass
class Scope:
    """The sample as a whole, or one group of it.

    Attributes:
        tests: the settings that were tested, in their order.
        policy: of the last setting that passed and saves layers; None for full mode.
        answers: those of that setting; None for full mode.
        p_value: of that setting.
    """

    tests: list[Tested] = field(default_factory=list)
    policy: ExitPolicy | None = None
    answers: TaskAnswers | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Calibrated:
    """What came out of a calibration.

    Attributes:
        scaling: of the exits that can be used.
        scopes: by group, or the whole sample under ``ALL``.
        groups: of the test part, by name.
        loss_interval: mean and upper bound of the losses; None if all is full mode.
        full_quality: mean metric of full mode's answers to the test part; None for losses other than quality.
        mean_exit_layer: with the chosen settings, see ``Certificate``; None if all is full mode.
    """

    scaling: tuple[ExitScaling, ...]
    scopes: dict[str, Scope]
    groups: dict[str, GroupResult]
    loss_interval: Interval | None
    full_quality: float | None
    mean_exit_layer: Interval | None


def usable_exits(specs: Sequence[ExitSpec], num_layers: int, plan: CalibrationPlan) -> tuple[int, ...]:
    """Layers of the exits where a token can leave before the last layer.

    Raises:
        ConfigError: there are none.
    """
    gated = POLICIES[plan.policy].gated
    layers = tuple(spec.layer for spec in specs if spec.layer < num_layers and (spec.gate or not gated))
    if not layers:
        what = "with a gate before the last layer; tune them with gate: true" if gated else "before the last layer"
        raise ConfigError(f"adapter: has no exit {what}, so there is nothing to calibrate")
    return layers


def calibrate(
    engine: Engine, sample: Sample, plan: CalibrationPlan, journal: Journal | None = None, *, batch: int = BATCH
) -> Calibrated:
    """Find the fastest thresholds that are safe.

    Args:
        engine: with the exits, without other requests.
        sample: from ``draw_sample``. Groups that are too small are not tested.
        plan: what is asked for.
        journal: of an earlier, unfinished call with the same arguments; ``entry_key`` is its key.
        batch: the engine's maximum number of running sequences.

    Raises:
        UserError: an answer fails, see ``answer_records``.
    """
    policy, layers = POLICIES[plan.policy], usable_exits(engine.exits, engine.num_layers, plan)
    measure = {} if policy.gated else {"measure": plan.measure}

    def answers(records: Records, setting: Setting, label: str = "answering in full mode") -> TaskAnswers:
        by_task = sorted(records, key=lambda record: record.task)
        return answer_records(engine, by_task, [setting], journal, batch=batch, label=label)

    full_mode = Setting(BASELINE, max_tokens=plan.max_tokens, stop=plan.stop)
    fit_answers = answers(sample.fit, full_mode).by_setting[BASELINE]
    full = answers(sample.test, full_mode)
    forced = force_answers(engine, sample.fit, fit_answers, layers, policy, measure, journal, batch)
    # Every loss is at most that of disagreement. The others are mostly far less, so faster settings may pass, too.
    likely = max(2 * plan.risk, 2 / len(sample.fit))
    most = likely if plan.loss == "disagreement" else 1.0
    scaling, candidates = candidate_settings(forced, layers, engine.num_layers, plan.points, likely, most)

    scopes = {name: Scope() for name in sample.needed}
    active = {name: each for name, each in scopes_of(sample.test, plan).items() if len(each) >= sample.needed[name]}
    for number, candidate in enumerate(candidates, start=1):
        records = [record for each in active.values() for record in each]
        chosen = _policy(candidate, policy, measure)
        label = f"answering in setting {number} of at most {len(candidates)}"
        found = answers(records, _setting(candidate, chosen, plan), label)
        [by_id] = found.by_setting.values()
        tests = {
            name: _test(each, candidate, plan, plan.test_delta(len(scopes)), by_id, full.by_setting[BASELINE])
            for name, each in active.items()
        }
        for name, test in tests.items():
            scopes[name].tests.append(test)
        together = plan.per_group != "own"
        p_values = {name: test.p_value for name, test in tests.items()}
        passed = passing(p_values, plan.test_delta(len(scopes)), together=together)
        faster = {name for name in passed if tests[name].saves(engine.num_layers)}
        for name in passed if together and faster else faster:
            scopes[name].policy, scopes[name].p_value = chosen, tests[name].p_value
            scopes[name].answers = found
        active = {name: active[name] for name in passed}
        if not active:
            break
    return _outcome(tuple(scaling), scopes, sample, plan, full)


def _policy(candidate: CandidateSetting, policy: type[ExitPolicy], measure: Mapping[str, str]) -> ExitPolicy:
    return policy(threshold=NEVER, thresholds=dict(candidate.thresholds), **measure)  # type: ignore[call-arg, arg-type]


def _setting(candidate: CandidateSetting, policy: ExitPolicy, plan: CalibrationPlan) -> Setting:
    """Its name depends on the thresholds: a journal may hold answers of settings that another version chose."""
    digest = hashlib.sha256(policy.model_dump_json().encode()).hexdigest()
    name = f"level {candidate.level:.6g} {digest[:16]}"
    return Setting(name, "threshold", policy, tuple(candidate.thresholds), plan.max_tokens, plan.stop)


def _test(
    records: Records, candidate: CandidateSetting, plan: CalibrationPlan, delta: float, early: Answers, full: Answers
) -> Tested:
    """The test of one setting on the records of one scope, in their order."""
    losses = _losses(records, plan, early, full)
    p = float(P_VALUES[plan.p_value](losses, plan.risk, delta))
    return Tested(
        level=candidate.level,
        p_value=p,
        passed=p <= delta,
        loss=float(losses.mean()),
        mean_exit_layer=_mean(*_exit_layers([early[record.id] for record in records])),
    )


def _losses(records: Records, plan: CalibrationPlan, early: Answers, full: Answers) -> Floats:
    return np.array([loss_of(plan.loss, plan.metric, early[r.id], full[r.id], r.references) for r in records])


def _outcome(
    scaling: tuple[ExitScaling, ...], scopes: dict[str, Scope], sample: Sample, plan: CalibrationPlan, full: TaskAnswers
) -> Calibrated:
    """What the chosen settings give on the test part, where each record runs in its scope's."""
    truth, used = full.by_setting[BASELINE], dict(full.by_setting[BASELINE])
    for name, records in scopes_of(sample.test, plan).items():
        if (kept := scopes[name].answers) is not None:
            [by_id] = kept.by_setting.values()
            used.update({record.id: by_id[record.id] for record in records})
    early = any(scope.answers is not None for scope in scopes.values())

    def interval(records: Records, delta: float) -> Interval | None:
        if not early:
            return None
        losses = _losses(records, plan, used, truth)
        return Interval(mean=float(losses.mean()), low=None, high=largest_risk(plan.p_value, losses, delta))

    delta, least = plan.test_delta(len(scopes)), max(sample.needed.values())
    groups = {
        name: GroupResult(
            n=len(records),
            needed=sample.needed.get(name, least),
            p_value=scopes[name].p_value if name in scopes else None,
            loss=interval(records, delta) if name not in scopes or scopes[name].answers is not None else None,
            policy=scopes[name].policy if plan.per_group == "own" else None,
        )
        for name, records in by_group(sample.test).items()
    }
    return Calibrated(
        scaling,
        scopes,
        groups,
        interval(sample.test, plan.delta),
        full_quality(sample.test, plan, truth),
        _mean_exit_layer([used[record.id] for record in sample.test], plan.seed) if early else None,
    )


def full_quality(records: Records, plan: CalibrationPlan, full: Answers) -> float | None:
    """Mean metric of full mode's answers; None if the loss is not one of quality."""
    if plan.loss != "quality":
        return None
    score = METRICS[plan.metric]
    return sum(score(full[record.id].text, record.references) for record in records) / len(records)


def _exit_layers(answers: Sequence[TaskAnswer]) -> tuple[Floats, Floats]:
    """Per answer, the sum of the exit layers of the tokens after its first one, and the number of these tokens."""
    sums = np.array([sum(each.layers[1:]) for each in answers], dtype=np.float64)
    return sums, np.array([len(each.layers) - 1 for each in answers], dtype=np.float64)


def _mean(sums: Floats, counts: Floats) -> float | None:
    return float(sums.sum() / counts.sum()) if counts.sum() else None


def _mean_exit_layer(answers: Sequence[TaskAnswer], seed: int) -> Interval | None:
    """With a 95% interval, from bootstrap samples of the answers."""
    sums, counts = _exit_layers(answers)
    mean = _mean(sums, counts)
    if mean is None:
        return None
    picks = np.random.default_rng(seed).integers(len(answers), size=(_RESAMPLES, len(answers)))
    low, high = np.quantile(sums[picks].sum(axis=1) / np.maximum(counts[picks].sum(axis=1), 1), (0.025, 0.975))
    return Interval(mean=mean, low=float(low), high=float(high))
