"""What a request's body and header say about early exit: ``early_exit``, ``vllm_xargs``, and the priority."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_ee.config.validation import validated
from megatron_ee.errors import ConfigError, DataError, shown
from megatron_ee.inference.policy import ExitPolicy, policy_from_json
from megatron_ee.serving.api.request_bodies import ChatCompletionRequest, CompletionRequest, EarlyExitFields
from megatron_ee.serving.rules.rules import Controls

IMPORTANT = "important"
PRIORITIES = ("default", IMPORTANT)


def early_exit_fields(body: CompletionRequest | ChatCompletionRequest) -> EarlyExitFields:
    """The fields of ``early_exit`` and ``vllm_xargs`` together.

    Raises:
        ConfigError: one is invalid, or they contradict each other.
    """
    own = body.early_exit or EarlyExitFields()
    try:
        other = validated(EarlyExitFields, _from_xargs(body.vllm_xargs or {}))
    except ConfigError as error:
        raise ConfigError(f"vllm_xargs.{error}") from None
    merged = own.model_dump(exclude_none=True)
    for name, value in other.model_dump(exclude_none=True).items():
        if name in merged and merged[name] != value:
            raise ConfigError(f"vllm_xargs.{name}: differs from early_exit.{name}; give only one of them")
        merged[name] = value
    return validated(EarlyExitFields, merged)


def controls_of(fields: EarlyExitFields, priority: str | None, header: str | None) -> Controls:
    """What a request says about early exit, for the rules.

    Args:
        fields: from ``early_exit_fields``.
        priority: the body's field.
        header: the header ``X-Priority``.

    Raises:
        ConfigError: the message names the field, or the header.
    """
    by_header = (header or "default").strip().lower()
    if by_header not in PRIORITIES:
        raise ConfigError(f"X-Priority: must be one of {', '.join(PRIORITIES)}, not {shown(header)}")
    mode = fields.mode
    if mode is None and fields.draft is not None:
        mode = "speculative"
    return Controls(
        mode=mode,
        policy=_policy(fields),
        exits=None if fields.exits is None else tuple(fields.exits),
        task=fields.task,
        important=IMPORTANT in (priority, by_header),
        uncertified=bool(fields.uncertified),
        group=fields.group,
        draft=fields.draft,
    )


def _from_xargs(given: Mapping[str, Any]) -> dict[str, Any]:
    """``vllm_xargs`` as ``early_exit``. Its values are flat, and clients may send numbers and lists as text."""
    fields: dict[str, Any] = {}
    draft: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("draft_exit", "draft_length"):
            draft[name.removeprefix("draft_")] = _number(value, int)
        elif name == "threshold":
            fields[name] = _number(value, float)
        elif name == "exits":
            parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
            fields[name] = [_number(part, int) for part in parts]
        elif name == "policy" and isinstance(value, str) and value.lstrip().startswith("{"):
            fields[name] = _json(value)
        elif name == "uncertified" and value in ("true", "false", 1, 0):
            fields[name] = value in ("true", 1)
        else:
            fields[name] = value
    if draft:
        fields.setdefault("draft", draft)
    return fields


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    """A number from its text; any other value as it is, for validation to refuse."""
    try:
        return kind(value) if isinstance(value, str) and len(value) < 40 else value
    except ValueError:
        return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _policy(fields: EarlyExitFields) -> ExitPolicy | None:
    """The exit policy that the body asks for; None if it asks for none."""
    form = {"name": fields.policy} if isinstance(fields.policy, str) else fields.policy
    if fields.threshold is not None:
        if form is not None and "threshold" in form:
            raise ConfigError("early_exit.threshold: policy has a threshold too; give only one of them")
        form = {**(form or {}), "threshold": fields.threshold}
    if form is None:
        return None
    try:
        return policy_from_json(form)
    except (ConfigError, DataError) as error:
        raise ConfigError(f"early_exit.policy.{error}") from None
