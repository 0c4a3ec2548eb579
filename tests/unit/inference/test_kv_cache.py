from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.inference.kv_cache import CHUNK, LayerKV


def run_of(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, length, 4, generator=generator), torch.randn(2, 3, length, 4, generator=generator)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=6))
def test_keeps_what_was_appended_in_order(lengths: list[int]) -> None:
    cache = LayerKV(sum(lengths))
    runs = [run_of(length, seed) for seed, length in enumerate(lengths)]
    for count, (key, value) in enumerate(runs, 1):
        kept = cache.extend(key, value)
        assert torch.equal(kept[0], torch.cat([key for key, _ in runs[:count]], dim=2))
        assert torch.equal(kept[1], torch.cat([value for _, value in runs[:count]], dim=2))
        assert cache.length == kept[0].shape[2] == sum(lengths[:count])


def test_moves_seldom_and_takes_no_room_beyond_the_limit() -> None:
    cache, places = LayerKV(20 * CHUNK + 1), []
    key, value = run_of(1, 0)
    for _ in range(20 * CHUNK + 1):
        kept, _ = cache.extend(key, value)
        if not places or kept.data_ptr() != places[-1]:
            places.append(kept.data_ptr())
    assert len(places) == 6  # 1, 2, 4, 8, 16 chunks, and then the limit
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_dtype_and_heads_are_those_of_what_is_kept() -> None:
    cache = LayerKV(8)
    kept, _ = cache.extend(*(tensor.bfloat16() for tensor in run_of(5, 0)))
    assert kept.dtype == torch.bfloat16 and kept.shape == (2, 3, 5, 4)


def test_more_than_the_limit_is_a_mistake_of_ours() -> None:
    cache = LayerKV(3)
    cache.extend(*run_of(3, 0))
    with pytest.raises(AssertionError, match="4 positions"):
        cache.extend(*run_of(1, 1))
