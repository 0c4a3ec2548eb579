"""Decides how each request runs: by its task's certificate, the rules file, its API key, and what it asks for itself.

From the strongest to the weakest:

1. A request that is marked as important, or whose key is, gets full mode's answer.
2. A request may ask for full or speculative mode, whose answers are the model's own.
3. Under a task with a certificate, the certificate sets the thresholds, and a request outside its settings runs in full
   mode. After an alarm of its audits (``set_alarms``) the task runs in full mode, or in a safer setting.
4. Otherwise the request's own choice counts, if it may choose, and then the task's rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError, shown
from megatron_ee.inference.certificate import Calibration, Decoding
from megatron_ee.inference.policy import ExitPolicy, ThresholdPolicy
from megatron_ee.inference.requests import Coverage, Draft, Mode, Request
from megatron_ee.serving.access import Key
from megatron_ee.serving.exit_record import OTHER
from megatron_ee.serving.rules.rules_file import ImportantRule, KeyRule, ModeRule
from megatron_ee.serving.rules.task_plans import Fallback, ModelExits, TaskPlan, TaskPlans, read_plans, with_policy

_DRIFTED = "drift: audits say that the certificate is no longer kept"
_PROMISE = {"task", "loss", "metric", "risk", "delta", "n", "per_group", "date", "full_layers"}


@dataclass(frozen=True)
class Controls:
    """What a request says about early exit.

    Attributes:
        mode: None if it does not choose.
        policy: an exit policy of its own.
        exits: layers of the exits to use.
        task: that it belongs to.
        important: whether it is marked so.
        uncertified: whether it may leave early outside the certificate's settings, or with thresholds of its own.
        group: for certificates with thresholds by group.
        draft: of speculative mode.
    """

    mode: Mode | None = None
    policy: ExitPolicy | None = None
    exits: tuple[int, ...] | None = None
    task: str | None = None
    important: bool = False
    uncertified: bool = False
    group: str | None = None
    draft: Draft | None = None


@dataclass(frozen=True)
class Decision:
    """How a request runs.

    Attributes:
        request: with its mode, policy, exits and coverage.
        task: one of ``Rules.tasks``, or ``other``.
        policy: what set the exits, in a few words.
        tier: of the request.
        reason: why its answer is not certified although its task has a certificate, or that it is important; None
            otherwise.
        certificate: SHA-256 of the certificate whose audits it counts for; None if it counts for none.
        alarms: that the audits of this certificate had raised before.
    """

    request: Request
    task: str
    policy: str
    tier: Literal["default", "important"]
    reason: str | None
    certificate: str | None = None
    alarms: int = 0


class Rules:
    """The rules in force. ``decoding`` and ``decide`` may be called in any thread.

    Attributes:
        calibrations: the certificates.
    """

    def __init__(
        self,
        path: Path | None,
        calibrations: Sequence[Calibration],
        *,
        exits: Sequence[ExitSpec],
        num_layers: int,
        key_names: Sequence[str] | None = None,
    ) -> None:
        """Read the rules and check them against the model.

        Args:
            path: of the rules file; None for the certificates alone.
            calibrations: the certificates, at most one for a task.
            exits: that requests may use.
            num_layers: of the model.
            key_names: names of the API keys, which rules for keys must name; None without a check.

        Raises:
            ConfigError: the file is wrong, or does not fit the model, the certificates or the keys. The message names
                file and key.
        """
        self._path, self.calibrations = path, tuple(calibrations)
        self._model = ModelExits(tuple(exits), num_layers)
        self._plans = self.read(key_names)
        self._alarms: dict[str, int] = {}

    def read(self, key_names: Sequence[str] | None = None) -> TaskPlans:
        """Read the file again, for ``use``.

        Args:
            key_names: as for a new ``Rules``.

        Raises:
            ConfigError: as for a new ``Rules``.
        """
        return read_plans(self._path, self.calibrations, self._model, key_names)

    def use(self, plans: TaskPlans) -> None:
        """Put other rules, from ``read``, into force for the requests that come."""
        self._plans = plans

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the configured tasks, without ``other``."""
        return tuple(self._plans.tasks)

    def set_alarms(self, certificate: str, alarms: int) -> None:
        """Run the requests of a certificate as after so many alarms of its audits; 0 is as certified."""
        self._alarms[certificate] = alarms

    def fallback(self, task: str) -> Fallback | None:
        """How a task runs after the alarms of its audits; None without any."""
        return self._fallback(self._plans.tasks[task])

    def decoding(self, controls: Controls, key: Key | None) -> Decoding | None:
        """The settings that a request's task was calibrated with, for what it leaves out; None without a certificate.

        Raises:
            ConfigError: the task is unknown, as in ``decide``.
        """
        plans = self._plans  # a reload replaces it at any time
        calibration = _task(plans, controls, _rule_of(plans, key)).certified
        return None if calibration is None else calibration.certificate.decoding

    def decide(self, request: Request, controls: Controls, key: Key | None, *, chat: bool) -> Decision:
        """How a request runs.

        Args:
            request: with the default mode, policy, exits, draft and coverage, which the decision replaces.
            controls: what it says about early exit.
            key: who sends it; None without keys.
            chat: whether its prompt went through the chat template.

        Raises:
            ConfigError: the task is unknown, the request may not choose what it chooses, or its choices do not fit
                together. The message names the field.
        """
        plans = self._plans
        rule = _rule_of(plans, key)
        plan = _task(plans, controls, rule)
        if controls.group is not None and not plan.by_group:
            raise ConfigError(f"group: task {shown(plan.name)} has no thresholds by group; leave it out")
        if controls.important:
            _check_important(controls)
        if controls.important or rule.priority == "important":
            return _important(plans.file.important, plan, request)
        own = _own(plan, controls)
        if not _may_choose(plans, rule) and (own is not None or controls.uncertified):
            raise ConfigError(f"{own or 'uncertified'}: this server's rules set it; leave it out")
        mode = controls.mode or ("threshold" if controls.policy is not None else plan.rule.mode or "threshold")
        if controls.draft is not None and mode != "speculative":
            raise ConfigError(f"draft: has no effect in mode {mode}; leave it out")
        if mode != "threshold":
            return _exact(plan, mode, request, controls)
        if plan.certified is not None and own is None:
            return self._certified(plan, plan.certified, request, controls, chat=chat)
        return _uncertified(plan, request, controls, own)

    def describe(self, key: Key | None = None) -> dict[str, Any]:
        """The rules in JSON types, as they hold for the requests of a key, and without paths.

        Args:
            key: who asks; None without keys.
        """
        plans = self._plans
        rule = _rule_of(plans, key)
        plan = _default(plans, rule)
        default = None if plan is None else self._described(plan) if plan.name == OTHER else {"task": plan.name}
        return {
            "default": default,
            "priority": rule.priority or "default",
            "important": plans.file.important.model_dump(mode="json", exclude_none=True),
            "may_choose": _may_choose(plans, rule),
            "may_name": list(_may_name(plans, rule)),
            "tasks": {name: self._described(plan) for name, plan in plans.tasks.items()},
        }

    def _certified(
        self, plan: TaskPlan, calibration: Calibration, request: Request, controls: Controls, *, chat: bool
    ) -> Decision:
        """With the certificate's thresholds, or as after an alarm."""
        fallback, digest = self._fallback(plan), calibration.sha256
        early = request.model_copy(update={"mode": "threshold", "policy": ThresholdPolicy(), "exits": None})
        uncertified = controls.uncertified and fallback is None
        applied = calibration.apply(early, chat=chat, group=controls.group, uncertified=uncertified)
        coverage, label = applied.coverage, f"certificate {plan.name}"
        assert coverage is not None, "apply sets it"
        if coverage.status != "certified":
            return Decision(applied, plan.name, "full" if applied.mode == "full" else label, "default", coverage.reason)
        if fallback is None:
            return Decision(applied, plan.name, label, "default", None, digest)
        if fallback.safer is None:
            coverage = coverage.model_copy(update={"status": "full", "reason": _DRIFTED})
            changed = request.model_copy(update={"mode": "full", "coverage": coverage})
            return Decision(changed, plan.name, "full", "default", _DRIFTED)
        reason = f"{_DRIFTED}; {fallback} is used"
        coverage = coverage.model_copy(update={"status": "uncertified", "reason": reason})
        changed = applied.model_copy(update={**with_policy(fallback.safer.policy), "coverage": coverage})
        return Decision(changed, plan.name, f"{label}, safer", "default", reason, digest, self._alarms[digest])

    def _fallback(self, plan: TaskPlan) -> Fallback | None:
        return None if plan.calibration is None else plan.after(self._alarms.get(plan.calibration.sha256, 0))

    def _described(self, plan: TaskPlan) -> dict[str, Any]:
        found = plan.rule.model_dump(mode="json", exclude_none=True, exclude={"on_alarm"})
        if plan.calibration is None:
            return found
        certificate, fallback = plan.calibration.certificate, self._fallback(plan)
        promise = certificate.model_dump(mode="json", include=_PROMISE | {"policy", "decoding"})
        return found | {
            "certificate": {"sha256": plan.calibration.sha256, **promise, "groups": sorted(certificate.groups)},
            "on_alarm": plan.on_alarm,
            "fallback": None if fallback is None else str(fallback),
        }


def _rule_of(plans: TaskPlans, key: Key | None) -> KeyRule:
    return KeyRule() if key is None else plans.file.keys.get(key.name, KeyRule())


def _may_choose(plans: TaskPlans, rule: KeyRule) -> bool:
    return plans.file.may_choose if rule.may_choose is None else rule.may_choose


def _may_name(plans: TaskPlans, rule: KeyRule) -> Sequence[str]:
    """The tasks that the requests of a key may name."""
    return tuple(plans.tasks) if rule.tasks is None else rule.tasks


def _default(plans: TaskPlans, rule: KeyRule) -> TaskPlan | None:
    """The plan of the requests of a key that name no task; None if they must name one."""
    if rule.task is not None:
        return plans.tasks[rule.task]
    return plans.default if rule.tasks is None or plans.default.name in rule.tasks else None


def _task(plans: TaskPlans, controls: Controls, rule: KeyRule) -> TaskPlan:
    """The plan of a request's task."""
    allowed = _may_name(plans, rule)
    possible = ", ".join(allowed) or "none"
    name = controls.task
    if name is None:
        plan = _default(plans, rule)
        if plan is None:
            raise ConfigError(f"task: this API key needs one; possible: {possible}")
        return plan
    if name not in allowed:
        raise ConfigError(f"task: there is no task {shown(name)} here; possible: {possible}")
    return plans.tasks[name]


def _own(plan: TaskPlan, controls: Controls) -> str | None:
    """The field with which a request chooses an early exit of its own; None if it does not."""
    if controls.policy is not None:
        return "policy"
    if controls.mode in ("full", "speculative"):
        return None
    if controls.exits is not None:
        return "exits"
    return "mode" if controls.mode == "threshold" and plan.rule.mode not in (None, "threshold") else None


def _check_important(controls: Controls) -> None:
    early = "mode" if controls.mode == "threshold" else "draft" if controls.draft is not None else None
    early = "policy" if controls.policy is not None else "exits" if controls.exits is not None else early
    if early is not None:
        raise ConfigError(f"{early}: an important request gets full mode's answer; leave out what is about exits")


def _important(rule: ImportantRule, plan: TaskPlan, request: Request) -> Decision:
    reason = "priority: important"
    settings = {"mode": rule.mode, "exits": rule.exits, "draft": rule.draft or Draft()}
    changed = request.model_copy(update={**settings, "coverage": _covered_full(plan, reason)})
    return Decision(changed, plan.name, rule.mode, "important", reason)


def _exact(plan: TaskPlan, mode: Mode, request: Request, controls: Controls) -> Decision:
    """Full or speculative mode."""
    if controls.policy is not None:
        raise ConfigError(f"policy: thresholds and policies have no effect in mode {mode}; leave them out")
    if controls.exits is not None and mode == "full":
        raise ConfigError("exits: have no effect in mode full; leave them out")
    rule = plan.rule if plan.rule.mode == mode else ModeRule()
    draft = controls.draft or rule.draft or Draft()
    exits = controls.exits if controls.exits is not None else rule.exits
    reason = f"mode {mode} was asked for" if controls.mode is not None else f"the server's rules say mode {mode}"
    coverage = _covered_full(plan, reason)
    changed = request.model_copy(update={"mode": mode, "draft": draft, "exits": exits, "coverage": coverage})
    return Decision(changed, plan.name, mode, "default", None if coverage is None else reason)


def _uncertified(plan: TaskPlan, request: Request, controls: Controls, own: str | None) -> Decision:
    """With the request's own thresholds, or the rule's."""
    coverage = None
    if plan.calibration is not None:
        if not controls.uncertified:
            raise ConfigError(
                f"{own}: task {shown(plan.name)} has a certificate, which sets the thresholds; leave it out, or say "
                "uncertified: true"
            )
        digest, reason = plan.calibration.sha256, f"{own}: the request chose it"
        coverage = Coverage(status="uncertified", task=plan.name, certificate=digest, reason=reason)
    policy = controls.policy or plan.rule.exit_policy
    exits = plan.rule.exits if own is None else controls.exits
    changed = request.model_copy(update={"mode": "threshold", "policy": policy, "exits": exits, "coverage": coverage})
    return Decision(changed, plan.name, _label(policy), "default", None if coverage is None else coverage.reason)


def _covered_full(plan: TaskPlan, reason: str) -> Coverage | None:
    """What the task's certificate says of full mode's answer."""
    if plan.calibration is None:
        return None
    return Coverage(status="full", task=plan.name, certificate=plan.calibration.sha256, reason=reason)


def _label(policy: ExitPolicy) -> str:
    """An exit policy in a few words."""
    if policy.named_exits().get("thresholds"):
        return f"{policy.name} by exit"
    threshold = getattr(policy, "threshold", None)
    return policy.name if threshold is None else f"{policy.name} {threshold:g}"
