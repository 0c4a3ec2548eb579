"""Packed matrices expand to ``(code - zero) * scale``, whatever the blocks, the cuts and the destination."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_ee.model.packed import Grid, PackedMatrix, join_halves

ROWS, COLUMNS = 12, 40


def draw(shape: tuple[int, ...], low: int, high: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def made(
    bits: int, grid: Grid, dtype: torch.dtype = torch.float32, *, zero: bool = True, columns: int = COLUMNS
) -> tuple[PackedMatrix, Tensor]:
    """A matrix and its values, each computed for itself."""
    codes = draw((ROWS, columns), 0, 2**bits)
    row_block = [(grid.first_row + row) // grid.rows for row in range(ROWS)]
    column_block = [(grid.first_column + column) // grid.columns for column in range(columns)]
    shape = (row_block[-1] + 1, column_block[-1] + 1)
    scale = (draw(shape, 1, 50, seed=1) / 64).to(dtype)
    zeros = draw(shape, 0, 2**bits, seed=2).to(dtype)
    values = torch.empty(ROWS, columns, dtype=dtype)
    for row, column in itertools.product(range(ROWS), range(columns)):
        block = row_block[row], column_block[column]
        values[row, column] = (codes[row, column].to(dtype) - (zeros[block] if zero else 8)) * scale[block]
    stored = codes.to(torch.uint8)
    stored = join_halves(stored) if bits == 4 else stored
    return PackedMatrix(stored, columns, bits, scale, zeros if zero else 8.0, grid), values


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "grid",
    [Grid(1, 8), Grid(1, 8, 0, 3), Grid(1, 64, 0, 30), Grid(ROWS, COLUMNS), Grid(5, 16, 3, 9), Grid(1, COLUMNS)],
)
def test_values(bits: int, grid: Grid) -> None:
    for dtype, zero in ((torch.float32, True), (torch.bfloat16, False), (torch.float16, True)):
        packed, values = made(bits, grid, dtype, zero=zero)
        out = torch.empty(ROWS, COLUMNS, dtype=dtype)
        packed.expand(out)
        assert torch.equal(out, values)
        wide = torch.full((ROWS, COLUMNS), torch.nan)
        packed.expand(wide, elements=2 * COLUMNS)  # in pieces, and in another dtype than the scales'
        assert torch.equal(wide, values.float())


def test_some_rows_into_runs_of_a_larger_tensor() -> None:
    packed, values = made(4, Grid(1, 8, 0, 3), torch.bfloat16)
    fused = torch.zeros(3, 5, COLUMNS, dtype=torch.bfloat16)  # two rows of each run are this matrix's
    for elements in (10**6, COLUMNS):
        fused.zero_()
        packed.expand(fused[:, 1:3], first=4, elements=elements)
        assert torch.equal(fused[:, 1:3].flatten(0, 1), values[4:10])
        assert not fused[:, [0, 3, 4]].any()


def test_an_odd_number_of_columns_of_four_bits() -> None:
    packed, values = made(4, Grid(1, 8, 0, 5), columns=13)
    out = torch.empty(ROWS, 13)
    packed.expand(out)
    assert torch.equal(out, values) and packed.codes.shape == (ROWS, 7)


def test_columns_in_any_order_of_groups() -> None:
    packed, _ = made(8, Grid(1, 8))
    order = draw((COLUMNS,), 0, 5, seed=3).int()
    assert isinstance(packed.zero, Tensor)
    shuffled = PackedMatrix(packed.codes, COLUMNS, 8, packed.scale, packed.zero, packed.grid, order)
    out = torch.empty(2, 6, COLUMNS)
    shuffled.expand(out)
    wide = order.long()
    assert torch.equal(out.flatten(0, 1), (packed.codes - packed.zero[:, wide]) * packed.scale[:, wide])


def test_bytes_in_memory() -> None:
    packed, _ = made(4, Grid(1, 8), torch.bfloat16)
    assert packed.nbytes == ROWS * COLUMNS // 2 + 2 * ROWS * (COLUMNS // 8) * 2
    assert packed.to(torch.device("cpu")).nbytes == packed.nbytes
