"""Keys and values of rows that have ended, kept for requests that begin with the same tokens.

Only positions that every layer has run are shared: where tokens left early and were deferred, those before the first of
them. A new row gets a copy, so that nothing it does reaches back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

LEAST = 16
"""Tokens that a copy has to spare: fewer are soon run."""


@dataclass(frozen=True)
class Prefix:
    """What a row holds for others.

    Attributes:
        row: its number.
        ids: tokens of the positions that are complete at every layer.
    """

    row: int
    ids: tuple[int, ...]


@dataclass
class Prefixes:
    """Which ended rows are kept; the stages hold their keys and values, the budget their claims.

    Attributes:
        most: rows that are kept at a time; 0 for none, and nothing is shared.
        window: smallest of the model's sliding windows; None where it has none.
    """

    most: int = 0
    window: int | None = None
    _kept: dict[int, Prefix] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """Numbers of the kept rows, the one that was of no use for longest first."""
        return list(self._kept)

    def keep(self, prefix: Prefix) -> list[int]:
        """Keep an ended row; the numbers of those that now have to go, perhaps its own."""
        if self.most == 0 or len(prefix.ids) < LEAST or any(self._covers(each, prefix) for each in self._kept.values()):
            return [prefix.row]
        gone = [each.row for each in self._kept.values() if self._covers(prefix, each)]
        for row in gone:
            del self._kept[row]
        self._kept[prefix.row] = prefix
        while len(self._kept) > self.most:
            gone.append(self.evict())
        return gone

    def longest(self, ids: Sequence[int], running: Iterable[Prefix]) -> Prefix | None:
        """The row, kept or running, that shares most with ``ids`` but their last token, and that much of it.

        None where it is less than ``LEAST``.
        """
        if self.most == 0:
            return None
        found: Prefix | None = None
        for each in (*self._kept.values(), *running):
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(each.ids, ids[:-1], strict=False)))
            if shared >= LEAST and self._serves(each, shared) and (found is None or shared > len(found.ids)):
                found = Prefix(each.row, each.ids[:shared])
        if found is not None and found.row in self._kept:
            self._kept[found.row] = self._kept.pop(found.row)
        return found

    def evict(self) -> int:
        """Forget the row that was of no use for longest; its number."""
        row = next(iter(self._kept))
        del self._kept[row]
        return row

    def _covers(self, prefix: Prefix, other: Prefix) -> bool:
        """Whether ``prefix`` does for others all that ``other`` does."""
        length = len(other.ids)
        return prefix.ids[:length] == other.ids and self._serves(prefix, length)

    def _serves(self, prefix: Prefix, length: int) -> bool:
        """Whether a row still has all that a token after ``length`` positions sees.

        With a sliding window, a layer has left behind what came before the window of its newest token.
        """
        complete = len(prefix.ids)
        return self.window is None or complete <= self.window or length >= complete - 1
