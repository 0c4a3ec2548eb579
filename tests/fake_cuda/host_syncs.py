"""Judges the waits of the host for the device by the list in ``host_syncs.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from .runs import Result

LIST = Path(__file__).with_name("host_syncs.toml")


@dataclass(frozen=True)
class Allowed:
    """One entry of the list: see its first lines."""

    where: str
    kind: str
    per: str
    most: int
    reason: str


def allowed(what: str) -> list[Allowed]:
    """The entries for ``tune`` or ``infer``."""
    return [Allowed(**entry) for entry in tomllib.loads(LIST.read_text(encoding="utf-8")).get(what, [])]


def not_allowed(result: Result) -> list[str]:
    """A line for each place where a run waits that is not in the list, or more often than it allows."""
    entries = allowed(result.name.split()[0])
    lines = []
    for (where, kind), count in sorted(result.syncs.items()):
        own = [entry for entry in entries if (entry.where, entry.kind) == (where, kind)]
        most = sum(entry.most * result.units[entry.per] for entry in own)
        if not own:
            lines.append(f"{where}: {count} of kind {kind}, which {LIST.name} does not list")
        elif count > most:
            lines.append(f"{where}: {count} of kind {kind}; {LIST.name} allows {most} here")
    return lines
