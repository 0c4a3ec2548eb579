"""API keys: which files are accepted, who gets in, and that no message contains a key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_ee.errors import ConfigError
from megatron_ee.serving.access import Access, Key, Unauthorized
from megatron_ee.serving.limits import RateLimited

ONE, OTHER = "1" * 8 + "secretsecret", "secretsecret" + "2" * 8
FILE = f"website: {{key: '{ONE}', requests_per_minute: 2, tokens_per_minute: 100}}\nstaff: {{key: '{OTHER}'}}\n"


def write(path: Path, text: str = FILE, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write(tmp_path / "keys.yaml")


def test_each_key_has_its_name_and_limits(keys: Path) -> None:
    access = Access(keys)
    assert access.required and access.names == ("website", "staff")
    assert access.authenticate(f"Bearer {ONE}") == Key("website", 2, 100)
    assert access.authenticate(f"bearer  {OTHER} ") == Key("staff")


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Basic {ONE}", ONE, f"Bearer {ONE}x", f"Bearer {ONE[:-1]}", "Bearer \xe9"],
)
def test_other_keys_are_refused(keys: Path, header: str | None) -> None:
    with pytest.raises(Unauthorized) as refused:
        Access(keys).authenticate(header)
    assert "secret" not in str(refused.value)


def test_without_a_file_no_key_is_needed() -> None:
    access = Access(None)
    assert not access.required and access.names == ()
    assert access.authenticate(None) is None and access.authenticate("Bearer anything") is None
    access.use(access.read())
    assert access.take(None, 10**9) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o610])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "keys.yaml", mode=mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}.*chmod 600"):
        Access(path)
    path.chmod(0o400)
    assert Access(path).names == ("website", "staff")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(keys: Path) -> None:
    os.chown(keys, 4711, -1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        Access(keys)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must have a line such as"),
        (ONE, "must have a line such as"),
        (f"- {ONE}", "must have a line such as"),
        (f"website: '{ONE}'", "entry 1: must be an object"),
        (f"website: [{ONE}]", "entry 1: must be an object"),
        ("website: {requests_per_minute: 3}", "entry 1: key: missing"),
        ("website: {key: short-secret}", "entry 1: key: must be 16 to 512"),
        (f"website: {{key: '{ONE} {OTHER}'}}", "entry 1: key: must be 16 to 512"),
        ("website: {key: 1234567890123456}", "entry 1: key: must be text; put it in quotes"),
        (f"website: {{key: ['{ONE}']}}", "entry 1: key: must be text"),
        (
            f"website: {{key: '{ONE}', requests_per_minute: 0}}",
            "entry 1: requests_per_minute: must be a whole .* at least 1$",
        ),
        (
            f"website: {{key: '{ONE}', tokens_per_minute: 1.5}}",
            "entry 1: tokens_per_minute: must be a whole number",
        ),
        (f"website: {{key: '{ONE}', request_per_minute: 3}}", "unknown fields: 1; possible: key, requests_per_minute"),
        (f"website: {{{ONE}}}", "entry 1: number of unknown fields: 1; possible: key"),
        (f"website: {{key: '{ONE}', requests_per_minute: {OTHER}}}", "entry 1: requests_per_minute: must be a whole"),
        (f"website: {{key: '{ONE}', tokens_per_minute: true}}", "entry 1: tokens_per_minute: must be a whole"),
        (f"{ONE}: {{requests_per_minute: 3}}", "entry 1: key: missing$"),
        (f"{ONE}: {OTHER}", "entry 1: must be an object"),
        (f"one: {{key: '{ONE}'}}\n{OTHER}: {{key: '{ONE}'}}", "entry 2: has the key of entry 1"),
        (f"'two words': {{key: '{ONE}'}}", "entry 1: its name"),
        (f"4711: {{key: '{ONE}'}}", "entry 1: its name"),
        (f"one: {{key: '{ONE}'}}\ntwo: {{key: '{ONE}'}}", "entry 2: has the key of entry 1"),
        (f"one: {{key: '{ONE}'}}\none: {{key: '{OTHER}'}}", r"keys.yaml:2: not valid YAML, or a name twice"),
        (f"one: {{key: *{ONE}}}", r"keys.yaml:1: not valid YAML"),
        (f"one: !{ONE} {{}}", r"keys.yaml:1: not valid YAML"),
        (f"one: {{key: {ONE}: {OTHER}}}", r"keys.yaml:1: not valid YAML"),
    ],
)
def test_bad_files_are_refused_without_their_keys(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        Access(write(tmp_path / "keys.yaml", text))
    assert "secret" not in str(refused.value) and "12345678" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_and_odd_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Access(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        Access(tmp_path)
    path = tmp_path / "keys.yaml"
    path.write_bytes(b"\xff" * 20)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="not UTF-8"):
        Access(path)


def test_the_key_does_not_show_in_objects(keys: Path) -> None:
    access = Access(keys)
    assert "secret" not in repr(vars(access)) + repr(access.authenticate(f"Bearer {ONE}"))


def test_reload_revokes_and_adds(keys: Path) -> None:
    access = Access(keys)
    write(keys, f"new: {{key: '{'n' * 20}'}}\nstaff: {{key: '{OTHER}'}}\n")
    access.use(access.read())
    assert access.names == ("new", "staff")
    with pytest.raises(Unauthorized, match="revoked"):
        access.authenticate(f"Bearer {ONE}")
    assert access.authenticate(f"Bearer {'n' * 20}") == Key("new")


@pytest.mark.parametrize("text, mode", [("", 0o600), ("website: {key: 5}", 0o600), (FILE, 0o644)])
def test_a_wrong_new_file_keeps_the_old_keys(keys: Path, text: str, mode: int) -> None:
    access = Access(keys)
    write(keys, text, mode)
    with pytest.raises(ConfigError):
        access.use(access.read())
    assert access.authenticate(f"Bearer {ONE}") == Key("website", 2, 100)


def test_a_reload_does_not_give_a_new_minute(keys: Path) -> None:
    now = [0.0]
    access = Access(keys, clock=lambda: now[0])
    key = access.authenticate(f"Bearer {ONE}")
    for _ in range(2):
        access.take(key, 10)
    access.use(access.read())
    with pytest.raises(RateLimited):
        access.take(access.authenticate(f"Bearer {ONE}"), 10)
    now[0] = 60.0
    access.take(key, 10)


def test_keys_have_separate_minutes(keys: Path) -> None:
    access = Access(keys)
    website, staff = access.authenticate(f"Bearer {ONE}"), access.authenticate(f"Bearer {OTHER}")
    grant = access.take(website, 100)
    for _ in range(50):
        assert access.take(staff, 1000) is None
    with pytest.raises(RateLimited):
        access.take(website, 1)
    access.settle(website, grant, 20)
    access.take(website, 80)
    access.settle(staff, None, 5)


def test_a_key_that_goes_and_comes_back_has_the_same_minute(keys: Path) -> None:
    access = Access(keys)
    website = access.authenticate(f"Bearer {ONE}")
    grant = access.take(website, 100)
    for text in (f"staff: {{key: '{OTHER}'}}", FILE):
        write(keys, text)
        access.use(access.read())
    access.settle(website, grant, 20)
    with pytest.raises(RateLimited):
        access.take(website, 81)
    access.take(website, 80)
