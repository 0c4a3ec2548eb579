"""One plan per task, from the rules file and the certificates, checked against the model before a request comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError, shown
from megatron_ee.inference.certificate import Calibration
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.inference.requests import Draft, Request
from megatron_ee.serving.exit_record import OTHER
from megatron_ee.serving.rules.rules_file import (
    DefaultRule,
    KeyRule,
    ModeRule,
    OnAlarm,
    RulesFile,
    TaskRule,
    read_rules,
)
from megatron_ee.serving.rules.safer_settings import SaferSetting, safer_settings

FULL = ModeRule(mode="full")


@dataclass(frozen=True)
class Fallback:
    """How a task runs after an alarm of its audits.

    Attributes:
        safer: the setting that it runs with; None for full mode.
    """

    safer: SaferSetting | None

    def __str__(self) -> str:
        return "full mode" if self.safer is None else f"the safer level {self.safer.level:.6g}"


@dataclass(frozen=True)
class TaskPlan:
    """One task: its rule, and its certificate if it has one.

    Attributes:
        name: of the task.
        rule: without a mode if the certificate decides.
        calibration: its certificate.
        on_alarm: see ``RulesFile``.
        safer: the settings to fall back to, one after each alarm, before full mode.
    """

    name: str
    rule: ModeRule
    calibration: Calibration | None = None
    on_alarm: OnAlarm = "full"
    safer: tuple[SaferSetting, ...] = ()

    @property
    def certified(self) -> Calibration | None:
        """The certificate, if it decides."""
        return self.calibration if self.rule.mode is None else None

    @property
    def by_group(self) -> bool:
        """Whether it has a certificate with thresholds by group."""
        return self.calibration is not None and self.calibration.certificate.per_group == "own"

    def after(self, alarms: int) -> Fallback | None:
        """How it runs after so many alarms; None without any."""
        if not alarms:
            return None
        return Fallback(self.safer[alarms - 1] if alarms <= len(self.safer) else None)


@dataclass(frozen=True)
class TaskPlans:
    """What one reading of the rules gave.

    Attributes:
        file: the rules file.
        default: of requests that name no task.
        tasks: by name.
    """

    file: RulesFile
    default: TaskPlan
    tasks: Mapping[str, TaskPlan]


@dataclass(frozen=True)
class ModelExits:
    """What rules are checked against.

    Attributes:
        exits: that requests may use.
        num_layers: of the model.
    """

    exits: tuple[ExitSpec, ...]
    num_layers: int

    def check(self, rule: ModeRule, where: str) -> None:
        """Check a rule against the exits.

        Raises:
            ConfigError: the message begins with ``where`` and names the key.
        """
        request = Request(
            prompt=(0,),
            mode=rule.mode or "full",
            policy=rule.exit_policy,
            exits=rule.exits,
            draft=rule.draft or Draft(),
        )
        gates = [spec.layer for spec in self.exits if spec.gate]
        try:
            request.check([spec.layer for spec in self.exits], self.num_layers, gates=gates)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def read_plans(
    path: Path | None, calibrations: Sequence[Calibration], model: ModelExits, key_names: Sequence[str] | None
) -> TaskPlans:
    """Read a rules file and make the plans; arguments and errors as for ``Rules``."""
    file = RulesFile() if path is None else read_rules(path)
    where = "--calibration" if path is None else str(path)
    by_task = _by_task(calibrations)
    tasks = {
        name: _plan(name, by_task.get(name), file, model, f"{where}: tasks.{name}")
        for name in dict.fromkeys((*by_task, *file.tasks))
    }
    default = _default(file.default, tasks, where)
    model.check(default.rule, f"{where}: default")
    model.check(file.important, f"{where}: important")
    for name, rule in file.keys.items():
        here = f"{where}: keys.{name}"
        if key_names is not None and name not in key_names:
            known = ", ".join(key_names) or "none; give them with --api-key-file"
            raise ConfigError(f"{here}: there is no API key of this name; there are: {known}")
        _check_tasks(rule, tasks, here)
    return TaskPlans(file, default, tasks)


def with_policy(policy: ExitPolicy) -> dict[str, Any]:
    """Fields of a request that leaves at the exits which a policy names."""
    exits = {layer for layers in policy.named_exits().values() for layer in layers}
    return {"policy": policy, "exits": tuple(sorted(exits))}


def _by_task(calibrations: Sequence[Calibration]) -> dict[str, Calibration]:
    found: dict[str, Calibration] = {}
    for each in calibrations:
        task = each.certificate.task
        if task in found:
            raise ConfigError(f"--calibration: {found[task].path} and {each.path} are both for task {shown(task)}")
        found[task] = each
    return found


def _plan(name: str, calibration: Calibration | None, file: RulesFile, model: ModelExits, where: str) -> TaskPlan:
    """The plan of one task."""
    rule = file.tasks.get(name, TaskRule())
    if name == OTHER:
        raise ConfigError(f"{where}: the name {OTHER} stands for requests without a task; choose another")
    if calibration is None:
        if rule.mode is None:
            raise ConfigError(f"{where}: give its mode, or a certificate for it with --calibration")
        if rule.on_alarm is not None:
            raise ConfigError(f"{where}.on_alarm: the task has no certificate, so nothing is audited; leave it out")
        model.check(rule, where)
        return TaskPlan(name, rule)
    if rule.mode == "threshold":
        raise ConfigError(f"{where}.mode: the task's certificate sets the thresholds; leave it out, or say full")
    model.check(rule, where)
    certificate = calibration.certificate
    for policy in (certificate.policy, *(group.policy for group in certificate.groups.values())):
        if policy is not None:
            model.check(ModeRule(mode="threshold", **with_policy(policy)), str(calibration.path))
    on_alarm = rule.on_alarm or file.on_alarm
    return TaskPlan(name, rule, calibration, on_alarm, safer_settings(certificate) if on_alarm == "safer" else ())


def _default(rule: DefaultRule | None, tasks: Mapping[str, TaskPlan], where: str) -> TaskPlan:
    """The plan of requests that name no task."""
    if rule is None:
        certified = [plan for plan in tasks.values() if plan.calibration is not None]
        return certified[0] if len(certified) == 1 else TaskPlan(OTHER, FULL)
    if rule.task is None:
        return TaskPlan(OTHER, rule)
    if rule.task not in tasks:
        raise ConfigError(f"{where}: default.task: {_unknown(rule.task, tasks)}")
    return tasks[rule.task]


def _check_tasks(rule: KeyRule, tasks: Mapping[str, TaskPlan], where: str) -> None:
    """Check the tasks that a rule for a key names."""
    for field, names in (("task", () if rule.task is None else (rule.task,)), ("tasks", rule.tasks or ())):
        for name in names:
            if name not in tasks:
                raise ConfigError(f"{where}.{field}: {_unknown(name, tasks)}")
    if rule.tasks is not None and rule.task is not None and rule.task not in rule.tasks:
        raise ConfigError(f"{where}.task: {shown(rule.task)} is not among its tasks")


def _unknown(name: str, tasks: Mapping[str, TaskPlan]) -> str:
    known = ", ".join(tasks) or "none"
    return f"there is no task {shown(name)}; there are: {known}; give it an entry in tasks, or its certificate"
