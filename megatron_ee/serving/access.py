"""API keys: who may use the server, and how much.

The key file is YAML. Each entry is a name, for logs and rules, and a key, with limits if there are any::

    website: {key: "5c1f...", requests_per_minute: 120, tokens_per_minute: 60000}
    staff: {key: "77b0..."}

Only its owner may read it. Messages about it never contain its text: by mistake a key may be anywhere in it, also in
the place of a name. So they number the entries. A server reads it again with ``read`` and ``use``: a key that is gone
is refused from then on. If the new file is wrong, the old keys stay.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from megatron_ee.config.untrusted import open_regular, read_whole
from megatron_ee.config.validation import Strict, validated
from megatron_ee.config.yaml_text import YamlProblem, parse_yaml
from megatron_ee.errors import CheckpointError, ConfigError, UserError
from megatron_ee.serving.limits import Grant, MinuteWindow

MAX_BYTES = 2**20
SHORTEST_KEY = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(rf"[!-~]{{{SHORTEST_KEY},512}}")
_MAKE_ONE = "make one with: openssl rand -hex 32"


class Unauthorized(UserError):
    """A request has no valid API key."""


@dataclass(frozen=True)
class Key:
    """Who sends a request. The key itself is not kept.

    Attributes:
        name: of the key.
        requests_per_minute: None for any number.
        tokens_per_minute: of prompts and answers together; None for any number.
    """

    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


def _key(value: Any) -> str:
    """Check a key. The messages do not contain it, so no other check may see it first."""
    if not isinstance(value, str):
        raise ValueError("must be text; put it in quotes")
    if not _KEY.fullmatch(value):
        raise ValueError(f"must be {SHORTEST_KEY} to 512 visible ASCII characters without spaces; {_MAKE_ONE}")
    return value


def _limit(value: Any) -> int | None:
    """Check a limit, with messages as ``_key``'s."""
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError("must be a whole number, at least 1")
    return value


Limit = Annotated[int | None, BeforeValidator(_limit)]


class KeyEntry(Strict):
    """One entry of the key file; see ``Key``."""

    key: Annotated[str, BeforeValidator(_key), Field(repr=False)]
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None


@dataclass(frozen=True)
class KeySet:
    """The keys of a file.

    Attributes:
        by_digest: by SHA-256 of the key (32 bytes).
    """

    by_digest: Mapping[bytes, Key]

    @property
    def names(self) -> tuple[str, ...]:
        """The keys' names, in the file's order."""
        return tuple(key.name for key in self.by_digest.values())


class Access:
    """The keys, and what each of them has used in the last minute. For the asyncio thread."""

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Read a key file.

        Args:
            path: None if no key is needed, for a server that only its own machine reaches.
            clock: in seconds.

        Raises:
            ConfigError: it cannot be read, others may read it, or an entry is invalid. The message has the file's path
                and the entry's number, and nothing of the file's text.
        """
        self._path, self._clock = path, clock
        self._keys = self.read()
        self._windows: dict[str, MinuteWindow] = {}

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return self._path is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The keys' names, in the file's order."""
        return self._keys.names

    def read(self) -> KeySet:
        """Read the file again, for ``use``.

        Raises:
            ConfigError: as for a new ``Access``.
        """
        return KeySet({} if self._path is None else _read_keys(self._path))

    def use(self, keys: KeySet, *, new_names: bool = True) -> None:
        """Put other keys into force. What a key has used counts on, also if its name goes and comes back.

        Args:
            keys: from ``read``.
            new_names: whether those whose name is new are included.
        """
        if not new_names:
            kept = {digest: key for digest, key in keys.by_digest.items() if key.name in self.names}
            keys = KeySet(kept)
        self._keys = keys

    def authenticate(self, authorization: str | None) -> Key | None:
        """Whose request it is; None if no key is needed.

        Args:
            authorization: value of the header; None without one.

        Raises:
            Unauthorized: there is no key, or an unknown one.
        """
        if not self.required:
            return None
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise Unauthorized("no API key was given; send the header Authorization: Bearer KEY")
        digest = _digest(given.strip())
        found = None
        for known, key in self._keys.by_digest.items():  # all of them, so that the time says nothing about the place
            if hmac.compare_digest(digest, known):
                found = key
        if found is None:
            raise Unauthorized("the API key is not known; it may have been revoked")
        return found

    def take(self, key: Key | None, tokens: int) -> Grant | None:
        """Count a request against its key's limits.

        Args:
            key: from ``authenticate``.
            tokens: the most that the request may use: its prompt's and those that it may emit, in all its outputs.

        Returns:
            For ``settle``; None if the key has no limits.

        Raises:
            RateLimited: the key has used its minute.
            ConfigError: the request may use more than a whole minute's tokens.
        """
        if key is None or (key.requests_per_minute is None and key.tokens_per_minute is None):
            return None
        window = self._windows.setdefault(key.name, MinuteWindow(self._clock))
        return window.take(tokens, key.requests_per_minute, key.tokens_per_minute)

    def settle(self, key: Key | None, grant: Grant | None, tokens: int) -> None:
        """Give back what a request has not used, at its end.

        Args:
            key: as for ``take``.
            grant: from ``take``.
            tokens: what it has used.
        """
        if key is not None and grant is not None and key.name in self._windows:
            self._windows[key.name].settle(grant, tokens)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _read_keys(path: Path) -> dict[bytes, Key]:
    """The keys of a file by their digests."""
    try:
        with open_regular(path) as fd:
            _check_private(os.fstat(fd), path)
            text = read_whole(fd, path, MAX_BYTES).decode("utf-8")
        entries = parse_yaml(text)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8; write it as plain text") from None
    except YamlProblem as problem:  # its text may contain a key
        where = str(path) if problem.line is None else f"{path}:{problem.line}"
        raise ConfigError(f"{where}: not valid YAML, or a name twice; put keys in quotes") from None
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f'{path}: must have a line such as  website: {{key: "..."}}  for each key; {_MAKE_ONE}')
    found: dict[bytes, Key] = {}
    for number, (name, values) in enumerate(entries.items(), start=1):
        where = f"{path}: entry {number}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: its name must be at most 64 letters, digits and . _ -; quote numbers")
        entry = _read_entry(values, where)
        digest = _digest(entry.key)
        if digest in found:
            raise ConfigError(f"{where}: has the key of entry {list(found).index(digest) + 1}; give each name its own")
        found[digest] = Key(name, entry.requests_per_minute, entry.tokens_per_minute)
    return found


def _read_entry(values: Any, where: str) -> KeyEntry:
    if not isinstance(values, dict):
        raise ConfigError(f'{where}: must be an object such as {{key: "..."}}')
    unknown = len(values.keys() - KeyEntry.model_fields.keys())
    if unknown:  # counted here, since ``validated`` would name them
        raise ConfigError(f"{where}: number of unknown fields: {unknown}; possible: {', '.join(KeyEntry.model_fields)}")
    return validated(KeyEntry, values, where=where)


def _check_private(status: os.stat_result, path: Path) -> None:
    """Refuse a file that others may read or change."""
    if status.st_mode & 0o077:
        raise ConfigError(f"{path}: others may read it (mode {status.st_mode & 0o777:04o}); run: chmod 600 {path}")
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{path}: belongs to another user (id {status.st_uid}); it must belong to the server's user")
