from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ee.inference.kv_cache import CHUNK, Extent, LayerKV, PackedCaches

KV_HEADS, PER_HEAD, DIM = 3, 2, 4


def run_of(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[tokens, kv_heads, head_dim]``."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, length, KV_HEADS, DIM, generator=generator)
    return key, value


def kept_form(part: Tensor) -> Tensor:
    return part.transpose(0, 1)[None]


# -- extents


def test_room_grows_by_chunks_up_to_the_limit() -> None:
    extent = Extent(3 * CHUNK + 5)
    lengths = (0, 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 1, 3 * CHUNK + 5)
    assert [extent.room(length) for length in lengths] == [
        0, CHUNK, CHUNK, 2 * CHUNK, 3 * CHUNK, 3 * CHUNK + 5, 3 * CHUNK + 5,
    ]  # fmt: skip
    assert Extent(7).room(2) == 7


def test_a_window_bounds_the_room() -> None:
    extent = Extent(10**6, window=1000, slack=17, pass_tokens=512)
    assert extent.room(300) == 2 * CHUNK
    assert extent.room(10**5) == extent.room(10**6) == math.ceil((1000 + 17 + 512) / CHUNK) * CHUNK
    assert Extent(100, window=1000).room(50) == 100


# -- one layer


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=6))
def test_keeps_what_was_appended_in_order(lengths: list[int]) -> None:
    cache = LayerKV(Extent(sum(lengths)))
    runs = [run_of(length, seed) for seed, length in enumerate(lengths)]
    for count, (key, value) in enumerate(runs, 1):
        kept = cache.extend(key, value)
        for ours, parts in zip(kept, zip(*runs[:count], strict=True), strict=True):
            assert torch.equal(ours, kept_form(torch.cat(parts)))
        assert cache.length == kept[0].shape[2] == sum(lengths[:count]) and cache.first == 0
        assert all(torch.equal(one, other) for one, other in zip(kept, cache.kept(), strict=True))


def test_moves_once_per_chunk_and_takes_no_room_beyond_the_limit() -> None:
    cache, places = LayerKV(Extent(6 * CHUNK + 1)), []
    key, value = run_of(1, 0)
    for _ in range(6 * CHUNK + 1):
        kept, _ = cache.extend(key, value)
        if not places or kept.data_ptr() != places[-1]:
            places.append(kept.data_ptr())
    assert len(places) == 7
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=60), st.integers(0, 2))
def test_a_window_keeps_what_tokens_see_and_what_comes_back(steps: list[tuple[int, int]], seed: int) -> None:
    """Runs of tokens of which some are taken back again, never more than ``slack`` of them."""
    extent = Extent(10**6, window=30, slack=20, pass_tokens=40)
    cache, keys, values = LayerKV(extent), *(torch.empty(0, KV_HEADS, DIM) for _ in range(2))
    for number, (count, back) in enumerate(steps):
        key, value = run_of(count, 1000 * seed + number)
        keys, values = torch.cat([keys, key]), torch.cat([values, value])
        for kept, all_ in zip(cache.extend(key, value), (keys, values), strict=True):
            assert torch.equal(kept, kept_form(all_[cache.first :]))
        assert cache.first <= max(0, len(keys) - count - extent.window + 1)  # what the oldest new token sees
        storage = cache.kept()[0].untyped_storage().nbytes()
        assert storage <= extent.room(len(keys)) * KV_HEADS * DIM * 4
        back = min(back, count)
        cache.crop(len(keys) - back)
        keys, values = keys[: len(keys) - back], values[: len(values) - back]
        assert cache.length == len(keys)


def test_cropping_removes_only_the_last_positions() -> None:
    cache = LayerKV(Extent(50))
    first, second = run_of(10, 0), run_of(3, 1)
    cache.extend(*first)
    cache.crop(12)  # there are no more than 10
    assert cache.length == 10
    cache.crop(6)
    kept, _ = cache.extend(*second)
    assert cache.length == 9 and torch.equal(kept, kept_form(torch.cat([first[0][:6], second[0]])))


def test_cropping_before_the_window_is_an_error() -> None:
    cache = LayerKV(Extent(10**6, window=4, slack=2, pass_tokens=CHUNK))
    for seed in range(4):
        cache.extend(*run_of(CHUNK, seed))
    assert cache.first > 0
    with pytest.raises(AssertionError, match="no longer kept"):
        cache.crop(cache.first - 1)


def test_a_copied_cache_is_independent() -> None:
    cache = LayerKV(Extent(50))
    first, ours, theirs = run_of(10, 0), run_of(5, 1), run_of(5, 2)
    cache.extend(*first)
    other, shorter, empty = (LayerKV(Extent(limit)) for limit in (50, 20, 50))
    other.begin(cache, 10)
    shorter.begin(cache, 7)
    empty.begin(LayerKV(Extent(50)), 0)
    assert torch.equal(cache.extend(*ours)[0], kept_form(torch.cat([first[0], ours[0]])))
    assert other.length == 10
    with pytest.raises(AssertionError, match="no such positions"):
        LayerKV(Extent(50)).begin(other, 11)
    with pytest.raises(AssertionError, match="no such positions"):
        other.begin(cache, 3)
    assert torch.equal(shorter.extend(*theirs)[0], kept_form(torch.cat([first[0][:7], theirs[0]])))
    assert torch.equal(other.extend(*theirs)[0], kept_form(torch.cat([first[0], theirs[0]])))
    assert torch.equal(cache.kept()[0], kept_form(torch.cat([first[0], ours[0]])))
    assert torch.equal(empty.extend(*ours)[1], kept_form(ours[1]))


def test_dtype_and_heads_are_those_of_what_is_kept() -> None:
    kept, _ = LayerKV(Extent(8)).extend(*(part.bfloat16() for part in run_of(5, 0)))
    assert kept.dtype == torch.bfloat16 and kept.shape == (1, KV_HEADS, 5, DIM)


def test_more_than_the_limit_is_a_mistake_of_ours() -> None:
    cache = LayerKV(Extent(3))
    cache.extend(*run_of(3, 0))
    with pytest.raises(AssertionError, match="4 positions"):
        cache.extend(*run_of(1, 1))


# -- several sequences


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, start: int, window: int | None, soft_cap: float | None = None
) -> Tensor:
    """Of one sequence, written out: ``query`` ``[tokens, kv_heads, per head, dim]`` from ``start`` on, all keys."""
    found = torch.empty_like(query)
    for token in range(len(query)):
        last = start + token
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(KV_HEADS):
            for each in range(PER_HEAD):
                scores = key[first : last + 1, head] @ query[token, head, each] / math.sqrt(DIM)
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                found[token, head, each] = scores.softmax(0) @ value[first : last + 1, head]
    return found.reshape(len(query), -1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4),
    st.sampled_from([None, 1, 5, 12]),
    st.sampled_from([None, 0.7]),
)
def test_attention_is_that_of_each_row_alone(rows: list[list[int]], window: int | None, soft_cap: float | None) -> None:
    """Sequences of different lengths, of which some go on in each pass; masks are shared between two layers."""
    caches = [[LayerKV(Extent(60, window, 3, 9)) for _ in range(2)] for _ in rows]
    keys, values = ([[torch.empty(0, KV_HEADS, DIM) for _ in range(2)] for _ in rows] for _ in range(2))
    for step in range(max(map(len, rows))):
        active = [row for row, counts in enumerate(rows) if step < len(counts)]
        counts = [rows[row][step] for row in active]
        masks: dict[tuple[int, int, int, int | None], Tensor] = {}
        for layer in range(2):
            generator = torch.Generator().manual_seed(100 * step + layer)
            query = torch.randn(sum(counts), KV_HEADS, PER_HEAD, DIM, generator=generator)
            key, value = torch.randn(2, sum(counts), KV_HEADS, DIM, generator=generator)
            packed = PackedCaches([caches[row][layer] for row in active], counts, masks)
            ours = packed.attend(query, key, value, window, soft_cap).split(counts)
            parts = zip(active, query.split(counts), key.split(counts), value.split(counts), ours, strict=True)
            for row, q, k, v, one in parts:
                start = len(keys[row][layer])
                keys[row][layer] = torch.cat([keys[row][layer], k])
                values[row][layer] = torch.cat([values[row][layer], v])
                expected = plain_attention(q, keys[row][layer], values[row][layer], start, window, soft_cap)
                assert one.shape == expected.shape
                assert (one - expected).abs().max() <= 1e-5


def test_attention_after_a_crop_does_not_see_what_was_taken_back() -> None:
    cache = LayerKV(Extent(40, 6, 4, 9))
    key, value = run_of(30, 0)
    query = torch.randn(30, KV_HEADS, PER_HEAD, DIM, generator=torch.Generator().manual_seed(9))
    for start, stop in ((0, 9), (9, 18), (18, 19), (19, 23)):
        PackedCaches([cache], [stop - start]).attend(query[start:stop], key[start:stop], value[start:stop], 6)
    cache.crop(20)
    wrong = key.clone()
    wrong[20:23] = 100.0
    for start, stop in ((20, 21), (21, 24)):
        ours = PackedCaches([cache], [stop - start]).attend(query[start:stop], key[start:stop], value[start:stop], 6)
        expected = plain_attention(query[start:stop], key[:stop], value[:stop], start, 6)
        assert (ours - expected).abs().max() <= 1e-5
