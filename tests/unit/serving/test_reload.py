"""SIGHUP: keys and rules are read again together, and no key is live without its rule."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ee.errors import ConfigError
from megatron_ee.serving.access import Access, Unauthorized
from megatron_ee.serving.rules.rules import Rules
from megatron_ee.serving.service import Service

KEYS = "website: {key: '1111222233334444'}\nstaff: {key: '5555666677778888'}\n"
NEW = "website: {key: 'aaaabbbbccccdddd'}\nguest: {key: '9999000099990000'}\n"
RULES = "keys: {staff: {priority: important}}"


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    """What a reload changes: two keys, one of which the rules name."""
    keys, rules = tmp_path / "keys.yaml", tmp_path / "rules.yaml"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    rules.write_text(RULES)
    access = Access(keys)
    return SimpleNamespace(
        keys=keys,
        file=rules,
        access=access,
        rules=Rules(rules, (), exits=(), num_layers=6, key_names=access.names),
        metrics=SimpleNamespace(configure=lambda tasks: None),
    )


def names(access: Access, *keys: str) -> list[str | None]:
    """Whose the keys are; None for those that are refused."""
    found: list[str | None] = []
    for key in keys:
        try:
            known = access.authenticate(f"Bearer {key}")
            found.append(None if known is None else known.name)
        except Unauthorized:
            found.append(None)
    return found


def test_wrong_rules_do_not_keep_a_key_from_being_revoked_and_let_no_new_name_in(parts: Any) -> None:
    parts.keys.write_text(NEW)
    with pytest.raises(ConfigError, match=r"keys\.staff: there is no API key"):
        Service.reload(parts)
    assert names(parts.access, "1111222233334444", "5555666677778888") == [None, None], "replaced, and revoked"
    assert names(parts.access, "aaaabbbbccccdddd", "9999000099990000") == ["website", None], "guest has no rule yet"
    parts.file.write_text("keys: {guest: {may_choose: false}}")
    Service.reload(parts)
    assert names(parts.access, "aaaabbbbccccdddd", "9999000099990000") == ["website", "guest"]


def test_wrong_keys_change_neither_keys_nor_rules(parts: Any) -> None:
    parts.keys.write_text("website: {}")
    parts.file.write_text("tasks: {drafts: {mode: full}}")
    with pytest.raises(ConfigError, match="keys.yaml: entry 1"):
        Service.reload(parts)
    assert parts.access.names == ("website", "staff") and parts.rules.tasks == ()
