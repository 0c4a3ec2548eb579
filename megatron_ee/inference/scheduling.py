"""Which rows run next: decisions alone, without model or state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PATIENCE = 4
"""Chains of others that a row lets pass before its turn comes whatever their number."""


def choose_place(waiting: Mapping[int, Sequence[int]], patience: int = PATIENCE) -> int:
    """The place whose rows go on next.

    A pass over few tokens costs about as much as one over a single one, since the weights have to be read either way:
    most is gained where most rows wait. So rows that need deep layers are left to gather while others are more, but
    none for longer than ``patience``.

    Args:
        waiting: by place, how many chains of others each row there has let pass.
        patience: see above.
    """
    late = [place for place, ages in waiting.items() if max(ages) >= patience]
    if late:
        return max(late)
    return max(waiting, key=lambda place: (len(waiting[place]), place))


def next_stop(place: int, asked: Sequence[int], end: int) -> int:
    """Where a row that goes on from ``place`` stops: at the next exit that it asks, or at the ``end`` of the stage."""
    return min((layer for layer in asked if place < layer <= end), default=end)
