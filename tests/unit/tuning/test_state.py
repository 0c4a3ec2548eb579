"""Runs of elements as boxes."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.tuning.state import run_boxes


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), data=st.data())
def test_boxes_hold_exactly_the_run(rows: int, columns: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows * columns))
    stop = data.draw(st.integers(start, rows * columns))
    numbered = torch.arange(rows * columns).view(rows, columns)
    boxes = list(run_boxes((rows, columns), start, stop))
    found = [numbered[r : r + height, c : c + width].flatten() for (r, c), (height, width) in boxes]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(start, stop))
    assert len(boxes) <= 3 and all(math.prod(shape) > 0 for _, shape in boxes)


def test_one_dimension_is_one_box() -> None:
    assert list(run_boxes((9,), 2, 5)) == [((2,), (3,))]
    assert list(run_boxes((9,), 4, 4)) == []
    assert list(run_boxes((9, 2), 8, 3)) == []
