"""The rules file: which requests may leave early, by task and by API key. YAML::

default: {task: inquiries}            # of requests that name no task
important: {mode: speculative}        # the answers are full mode's; {mode: full} if this is left out
tasks:
  inquiries: {on_alarm: safer}        # a task with a certificate (--calibration) needs no entry
  drafts: {mode: threshold, threshold: 0.8}
  legal: {mode: full}
keys:
  back-office: {priority: important}
  website: {task: inquiries, tasks: [inquiries], may_choose: false}
may_choose: true
on_alarm: full
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_ee.config.untrusted import open_regular, read_whole
from megatron_ee.config.validation import Strict, validated
from megatron_ee.config.yaml_text import YamlProblem, parse_yaml
from megatron_ee.errors import CheckpointError, ConfigError, shown
from megatron_ee.inference.policy import AnyPolicy, ExitPolicy, ThresholdPolicy
from megatron_ee.inference.requests import Draft, Layers, Mode

MAX_BYTES = 2**20
OnAlarm = Literal["full", "safer"]
TaskName = Annotated[str, Field(min_length=1, max_length=100)]


class ModeRule(Strict):
    """How requests run, where they do not choose and no certificate says it.

    Attributes:
        mode: see ``Request``.
        threshold: of threshold mode: a token leaves at the first exit that is at least this confident.
        policy: of threshold mode, in place of ``threshold``: an exit policy, such as thresholds by exit.
        exits: layers of the exits to use; all if it is left out.
        draft: of speculative mode.
    """

    mode: Mode | None = None
    threshold: float | None = Field(default=None, gt=0)
    policy: AnyPolicy | None = None
    exits: Layers | None = None
    draft: Draft | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in ("threshold", "policy"):
            if getattr(self, name) is not None and self.mode != "threshold":
                raise ValueError(f"{name}: has an effect in mode threshold only; say mode: threshold")
        if self.threshold is not None and self.policy is not None:
            raise ValueError("policy: sets the thresholds; leave out threshold")
        if self.draft is not None and self.mode != "speculative":
            raise ValueError("draft: has an effect in mode speculative only; say mode: speculative")
        if self.exits is not None and self.mode in (None, "full"):
            raise ValueError("exits: have an effect in modes threshold and speculative only; say which")
        return self

    @property
    def exit_policy(self) -> ExitPolicy:
        """The exit policy; the default one if none is given."""
        if self.policy is not None:
            return self.policy
        return ThresholdPolicy() if self.threshold is None else ThresholdPolicy(threshold=self.threshold)


class DefaultRule(ModeRule):
    """Requests that name no task: the task that they belong to, or how they run.

    Attributes:
        task: a task of the file or of a certificate.
    """

    task: TaskName | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.task is None) == (self.mode is None):
            raise ValueError("give either the task of requests that name none, or their mode")
        return self


class ImportantRule(ModeRule):
    """Requests that are marked as important. Their answers are always full mode's."""

    mode: Literal["full", "speculative"] = "full"


class TaskRule(ModeRule):
    """One task.

    Attributes:
        on_alarm: what to do if audits say that the task's certificate is no longer kept; see ``RulesFile``.
    """

    on_alarm: OnAlarm | None = None


class KeyRule(Strict):
    """Requests with one API key.

    Attributes:
        priority: ``important``: all of them count as important.
        task: task of those that name none.
        tasks: the tasks that they may name; all if it is left out.
        may_choose: see ``RulesFile``.
    """

    priority: Literal["important"] | None = None
    task: TaskName | None = None
    tasks: Annotated[tuple[TaskName, ...], Field(strict=False)] | None = None
    may_choose: bool | None = None


class RulesFile(Strict):
    """The whole file.

    Attributes:
        default: requests that name no task. If it is left out, they belong to the task of the only certificate; with
            several certificates or none they run in full mode.
        important: requests that are marked as important.
        tasks: by name.
        keys: by name of the API key.
        may_choose: whether requests may choose thresholds, policies, exits, threshold mode and ``uncertified``
            themselves. They may always ask for full or speculative mode.
        on_alarm: if audits say that a certificate is no longer kept. ``full``: its requests run in full mode;
            ``safer``: they run with the next safer of the settings that passed the calibration, then full mode.
    """

    default: DefaultRule | None = None
    important: ImportantRule = ImportantRule()
    tasks: Mapping[TaskName, TaskRule] = Field(default_factory=dict)
    keys: Mapping[str, KeyRule] = Field(default_factory=dict)
    may_choose: bool = True
    on_alarm: OnAlarm = "full"


def read_rules(path: Path) -> RulesFile:
    """Read a rules file.

    Raises:
        ConfigError: it cannot be read, or a key is unknown or has a wrong value. The message names file and key.
    """
    try:
        with open_regular(path) as fd:
            values = parse_yaml(read_whole(fd, path, MAX_BYTES).decode("utf-8"))
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: byte {error.start}: {error.reason}") from None
    except YamlProblem as problem:
        where = str(path) if problem.line is None else f"{path}:{problem.line}"
        raise ConfigError(f"{where}: not valid YAML: {problem.problem}") from None
    if values is None:  # all of it may be comments
        return RulesFile()
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys such as {', '.join(RulesFile.model_fields)}, not {shown(values)}")
    return validated(RulesFile, values, where=str(path))
