"""Makes ranks succeed or fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from megatron_ee import errors
from megatron_ee.errors import UserError

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]
"""A function that gives every rank the list of all ranks' objects (tuples, lists, dicts, strings and numbers), by
rank."""


def together(gather: Gather | None, work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank; returns all results, in order of rank.

    Args:
        gather: None if there is only one rank.
        work: called on every rank.

    Raises:
        UserError: on all ranks, with the type of the first failing rank's error. ``common`` is set, so that only one
            rank prints it. A rank that failed raises its own error.
    """
    if gather is None:
        return [work()]
    failure: Exception | None = None
    try:
        answer: tuple[Any, str, str] = (work(), "", "")
    except Exception as error:
        answer, failure = (None, type(error).__name__, str(error) or type(error).__name__), error
    answers = gather(answer)
    for rank, (_, kind, message) in enumerate(answers):
        if not kind:
            continue
        if failure is None or (isinstance(failure, UserError) and str(failure) != message):
            same = all(other == (None, kind, message) for other in answers)
            failure = getattr(errors, kind, UserError)(message if same else f"rank {rank}: {message}")
        if isinstance(failure, UserError):
            failure.common = True
        raise failure
    return [value for value, _, _ in answers]


def each_own(gather: Gather | None, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank; returns only this rank's result. Raises as ``together``."""
    results: list[T] = []
    together(gather, lambda: results.append(work()))
    return results[0]
