"""Computed tensors: drawn as torch draws a whole one, and the same in whatever boxes they are read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ee.checkpoint import derived
from megatron_ee.checkpoint.derived import constant, copied, low_rank_sum, normal
from megatron_ee.checkpoint.initialise import random_tensor
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.testing.hostile import architecture


def in_memory(tensor: Tensor, name: str = "w") -> StoredTensor:
    def read(out: Tensor, offset: Sequence[int]) -> None:
        out.copy_(tensor[tuple(slice(o, o + n) for o, n in zip(offset, out.shape, strict=True))])

    return StoredTensor(tensor.dtype, tuple(tensor.shape), read, (Path(f"{name}.safetensors"),))


def whole(tensor: StoredTensor) -> Tensor:
    out = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)
    tensor.read(out, (0,) * len(tensor.shape))
    return out


def drawn_at_once(seed: int, std: float, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape).normal_(0, std, generator=torch.Generator().manual_seed(seed))


def test_drawing_in_tiles_is_drawing_at_once() -> None:
    # Three tiles, which are reached in any order.
    shape = (3001, 701)
    assert shape[0] * shape[1] > 2 * derived.DRAWN_TILE
    expected, tensor = drawn_at_once(5, 0.02, shape), normal(5, 0.02, shape, torch.float32)
    part = torch.empty(7, 3)
    for row in (2990, 0, 1495, 2994):
        tensor.read(part, (row, 11))
        assert torch.equal(part, expected[row : row + 7, 11:14]), row
    assert torch.equal(torch.cat([slab.clone() for slab in tensor.slabs()]), expected)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 40),
    tile=st.integers(1, 400),
    seed=st.integers(-(2**63), 2**63 - 1),
    data=st.data(),
)
def test_any_box_of_any_tile_is_the_same(rows: int, columns: int, tile: int, seed: int, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derived, "DRAWN_TILE", tile)
        patch.setattr(derived, "PRODUCT_TILE", tile)
        expected = drawn_at_once(seed, 0.5, (rows, columns))
        w0, b, a = expected.bfloat16(), torch.randn(rows, 3), torch.randn(3, columns)
        product = low_rank_sum(("w", in_memory(w0)), ("b", in_memory(b)), ("a", in_memory(a)), torch.float32)
        rounded = normal(seed, 0.5, (rows, columns), torch.bfloat16)
    torch.testing.assert_close(whole(product), w0.float() + b @ a, atol=1e-5, rtol=1e-5)
    for tensor, values in ((rounded, expected.bfloat16()), (product, whole(product))):
        first = data.draw(st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1)))
        size = data.draw(st.tuples(st.integers(1, rows - first[0]), st.integers(1, columns - first[1])))
        box = values[first[0] : first[0] + size[0], first[1] : first[1] + size[1]]
        # Also into a wider dtype, what is stored is what is read; strides do not matter.
        for out in (torch.empty(size, dtype=tensor.dtype), torch.empty(size[::-1], dtype=torch.float64).T):
            tensor.read(out, first)
            assert torch.equal(out, box.to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_head_is_multiplied_out_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    w0, b, a = (torch.randn(shape, generator=generator).to(dtype) for shape in ((1100, 4001), (1100, 8), (8, 4001)))
    names = [("model.embed_tokens.weight", w0), ("exits.2.lm_head.b", b), ("exits.2.lm_head.a", a)]
    tensor = low_rank_sum(*((name, in_memory(each, name)) for name, each in names), dtype)
    assert tensor.dtype == dtype and tensor.shape == (1100, 4001) and w0.numel() > derived.PRODUCT_TILE
    expected = w0.double() + b.double() @ a.double()
    # Rounded once, to the dtype: half a unit in the last place, and what float32 adds.
    tolerance = torch.finfo(dtype).eps * (0.5 if dtype == torch.bfloat16 else 8)
    torch.testing.assert_close(whole(tensor).double(), expected, rtol=tolerance, atol=1e-5)
    assert [path.stem for path in tensor.files] == [name for name, _ in names]
    assert all(name in tensor.made for name, _ in names)


def test_what_is_drawn_follows_from_seed_and_name() -> None:
    def expected(text: str, std: float, shape: tuple[int, ...]) -> Tensor:
        digest = hashlib.sha256(text.encode()).digest()
        return drawn_at_once(int.from_bytes(digest[:8], "little", signed=True), std, shape)

    def values(name: str, *shape: int) -> Tensor:
        return whole(random_tensor(name, shape, 3, 7, torch.float32, architecture()))

    down, gate = "exits.3.mlp.down_proj.weight", "exits.3.mlp.gate_proj.weight"
    assert torch.equal(values(down, 24, 10), expected(f"7/{down}", 0.02 / math.sqrt(6), (24, 10)))
    assert torch.equal(values(gate, 10, 24), expected(f"7/{gate}", 0.02, (10, 24)))
    assert torch.equal(values("exits.3.lm_head.a", 5, 24), expected("7/exits.3.lm_head.a", 0.02, (5, 24)))
    assert torch.equal(values("exits.3.lm_head.b", 40, 5), torch.zeros(40, 5))
    for norm in ("norm.weight", "self_attn.q_norm.weight", "input_layernorm.weight"):
        assert torch.equal(values(f"exits.3.{norm}", 24), torch.ones(24))
    assert torch.equal(values("exits.3.self_attn.q_proj.bias", 24), torch.zeros(24))


def test_what_is_made_otherwise_is_described_otherwise() -> None:
    base = in_memory(torch.zeros(4, 4))
    tensors: list[Any] = [
        base,
        copied("a", base),
        copied("b", base),
        copied("b", copied("a", base)),
        low_rank_sum(("w", base), ("b", base), ("a", base), torch.float32),
        low_rank_sum(("w", base), ("b", base), ("a", normal(1, 0.02, (4, 4), torch.float32)), torch.float32),
        constant(0.0, (4, 4), torch.float32),
        constant(1.0, (4, 4), torch.float32),
        normal(1, 0.02, (4, 4), torch.float32),
        normal(2, 0.02, (4, 4), torch.float32),
        normal(1, 0.01, (4, 4), torch.float32),
    ]
    assert len({tensor.made for tensor in tensors}) == len(tensors)
    assert torch.equal(whole(tensors[3]), whole(base))
