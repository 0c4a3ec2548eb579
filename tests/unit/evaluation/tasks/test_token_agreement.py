"""Agreement of two answers, token by token."""

from __future__ import annotations

import pytest

from megatron_ee.evaluation.tasks.agreement import compare_tokens


@pytest.mark.parametrize(
    ("mine", "full", "departure", "before", "equal"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], None, 1.0, 1.0),
        ([1, 2, 9, 4], [1, 2, 3, 4], 2, 0.5, 0.75),
        ([9, 2, 3, 4], [1, 2, 3, 4], 0, 0.0, 0.75),
        ([1, 2], [1, 2, 3, 4], 2, 0.5, 0.5),
        ([1, 2, 3, 4], [1], 1, 0.25, 0.25),
    ],
)
def test_agreement(mine: list[int], full: list[int], departure: int | None, before: float, equal: float) -> None:
    found = compare_tokens(mine, full)
    assert (found.departure, found.before, found.equal_tokens) == (departure, before, equal)
    assert found.equal is (departure is None)
