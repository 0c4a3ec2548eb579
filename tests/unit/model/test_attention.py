"""Rotary frequencies, masks, and passes over a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.architecture import Rope
from megatron_ee.inference.kv_cache import Extent, LayerKV, PackedCaches
from megatron_ee.model import attention as attention_module
from megatron_ee.model.attention import (
    Attention,
    Positions,
    attend_soft_capped,
    make_positions,
    make_rotary,
    packed_positions,
    rope_frequencies,
    visible_keys,
)
from megatron_ee.testing.models import FAMILIES


@pytest.mark.parametrize("head_dim", [16, 20, 128])
@pytest.mark.parametrize(
    "rope",
    [
        Rope(),
        Rope(theta=500_000.0),
        Rope(theta=10_000.0, kind="linear", factor=4.0),
        Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        Rope(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192),  # Llama 3.2
        Rope(10_000.0, "llama3", 2.0, 0.5, 8.0, 64),
    ],
)
def test_frequencies_equal_transformers(rope: Rope, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        parameters["original_max_position_embeddings"] = rope.original_positions
    config = LlamaConfig(
        head_dim=head_dim,
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=2**17,
        rope_parameters=parameters,
    )
    torch.testing.assert_close(
        rope_frequencies(rope, head_dim), LlamaRotaryEmbedding(config).inv_freq, atol=0, rtol=2e-6
    )


def positions(length: int, valid: list[list[int]] | None = None) -> Positions:
    key_valid = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    return make_positions([make_rotary(Rope(), 8)], torch.float32, length, key_valid)


def visible(mask: Tensor | None) -> list[list[int]]:
    assert mask is not None and mask.shape[:2] == (1, 1)
    return mask[0, 0].int().tolist()


def test_plain_causal_passes_need_no_mask() -> None:
    assert positions(6).mask(None) is None
    assert positions(6).mask(6) is None  # a window that covers all
    assert positions(1).mask(3) is None


def test_masks_by_hand() -> None:
    assert visible(positions(4).mask(2)) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    # Padding is seen by nobody but itself, on either side.
    assert visible(positions(4, [[0, 0, 1, 1]]).mask(None)) == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    assert visible(positions(4, [[1, 1, 1, 0]]).mask(2)) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_visible_keys_of_later_queries() -> None:
    query, key = torch.tensor([2, 3]), torch.arange(4)
    assert visible_keys(query, key, None).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible_keys(query, key, 3).int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]


def test_padded_rows_count_their_own_tokens() -> None:
    padded = positions(4, [[0, 0, 1, 1], [1, 1, 1, 0]])
    plain = positions(4)
    ((cos, sin),), ((plain_cos, plain_sin),) = padded.angles, plain.angles
    assert torch.equal(cos[2:, 0], plain_cos[:2, 0]) and torch.equal(sin[2:, 0], plain_sin[:2, 0])
    assert torch.equal(cos[:3, 1], plain_cos[:3, 0])


def test_packed_positions_are_those_of_the_tokens() -> None:
    packed = packed_positions([make_rotary(Rope(), 8)], torch.float32, torch.tensor([3, 0, 1]))
    plain = positions(4)
    for ours, theirs in zip(packed.angles[0], plain.angles[0], strict=True):
        assert torch.equal(ours, theirs[[3, 0, 1]])


def test_masks_are_built_once() -> None:
    one = positions(4)
    assert one.mask(2) is one.mask(2) and one.mask(2) is not one.mask(3)


@pytest.fixture
def sdpa(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of ``scaled_dot_product_attention``: heads and lengths of queries and keys, and the options."""
    calls: list[dict[str, Any]] = []
    real = F.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        calls.append({"query": query.shape[1:3], "key": key.shape[1:3], "mask": attn_mask, **options})
        return real(query, key, value, attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


@pytest.mark.parametrize("block", [3, 512])
@pytest.mark.parametrize("window", [None, 1, 4, 7, 19, 20, 64])
@pytest.mark.parametrize("groups_of_heads", [1, 2, 4])
def test_a_window_hides_keys_without_grouped_heads_beside_a_mask(
    block: int,
    window: int | None,
    groups_of_heads: int,
    sdpa: list[dict[str, Any]],
    groups: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Value and gradients equal those of all scores; no mask covers the whole sequence."""
    monkeypatch.setattr(attention_module, "WINDOW_QUERIES", block)
    seq, batch, heads, size = 20, 2, 4, 8
    own = object.__new__(Attention)
    torch.nn.Module.__init__(own)
    own.window, own.head_dim, own.queries_per_group, own.repeats_keys = window, size, heads // groups_of_heads, False
    own.soft_cap = None
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    query, key = draw(seq, batch, groups_of_heads, own.queries_per_group, size), draw(seq, batch, groups_of_heads, size)
    value, weight = draw(seq, batch, groups_of_heads, size), torch.randn(seq, batch, heads * size, generator=generator)
    context = own._attend(query, key, value, positions(seq))
    (context * weight).sum().backward()
    calls, found = list(sdpa), [each.grad.clone() for each in (query, key, value)]

    repeated = [each.repeat_interleave(own.queries_per_group, dim=2).permute(1, 2, 0, 3) for each in (key, value)]
    where = torch.arange(seq)
    scores = query.flatten(2, 3).permute(1, 2, 0, 3) @ repeated[0].mT / size**0.5
    scores = scores.masked_fill(~visible_keys(where, where, window), -torch.inf)
    expected = (scores.softmax(-1) @ repeated[1]).permute(2, 0, 1, 3).flatten(2)
    for each in (query, key, value):
        each.grad = None
    (expected * weight).sum().backward()
    torch.testing.assert_close(context, expected, atol=1e-6, rtol=1e-5)
    for ours, each in zip(found, (query, key, value), strict=True):
        torch.testing.assert_close(ours, each.grad, atol=1e-5, rtol=1e-5)

    seen = seq if window is None else min(window, seq)
    assert calls[0]["mask"] is None and calls[0]["is_causal"] == (seen > 1) and calls[0]["query"][1] == seen
    assert len(calls) == 1 + -(-(seq - seen) // block)
    for call in calls[1:]:
        assert not call.get("enable_gqa") and call["query"][0] == call["key"][0], "which would compute all scores"
        assert call["key"][1] <= min(block, seq - seen) + seen


@pytest.mark.parametrize("block", [3, 512])
@pytest.mark.parametrize("window", [None, 4])
def test_capped_scores_in_blocks(block: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients equal those of all scores, of rows with padding and of queries behind other keys."""
    monkeypatch.setattr(attention_module, "WINDOW_QUERIES", block)
    seq, batch, shared, size, cap = 20, 2, 3, 8, 0.7
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(seq, batch, 2, shared, size, generator=generator).requires_grad_()
    key, value = (torch.randn(seq, batch, 2, size, generator=generator).requires_grad_() for _ in range(2))
    where = torch.arange(seq)
    valid = torch.stack([where >= 5, where < 17])
    visible = visible_keys(where, where, window) & valid[:, None] | torch.eye(seq, dtype=torch.bool)
    scores = torch.einsum("qbgsd,kbgd->bgsqk", query, key) / size**0.5
    scores = (cap * (scores / cap).tanh()).masked_fill(~visible[:, None, None], -torch.inf)
    expected = torch.einsum("bgsqk,kbgd->qbgsd", scores.softmax(-1), value).flatten(2)
    inputs = (query, key, value)
    context = attend_soft_capped(*inputs, cap, window, valid)
    torch.testing.assert_close(context, expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn(expected.shape, generator=generator)
    ours, theirs = (torch.autograd.grad((each * weight).sum(), inputs) for each in (context, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    behind = attend_soft_capped(query[13:], key, value, cap, window, valid)
    torch.testing.assert_close(behind, expected[13:], atol=1e-6, rtol=1e-5)


def test_keys_are_repeated_where_no_kernel_groups_heads(
    sdpa: list[dict[str, Any]], saved_model: Any, load_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = saved_model("qwen3")
    tokens = torch.randint(0, 64, (2, 12))
    outputs = []
    for grouped in (True, False):
        monkeypatch.setattr(platform, "groups_heads", lambda dtype, grouped=grouped: grouped)
        stage = load_stage(path, layers=range(1, 3))
        h = stage.backbone.embed(tokens.to(platform.device()))
        outputs.append(stage.run_layers(h, stage.backbone.positions(12))[0])
        assert all(call["enable_gqa"] == grouped for call in sdpa)
        assert all((call["query"][0] == call["key"][0]) != grouped for call in sdpa)
        sdpa.clear()
    torch.testing.assert_close(*outputs)


@torch.no_grad()
def packed(stage: Any, tokens: Tensor, passes: list[int]) -> Tensor:
    """h after the last layer, of rows ``[rows, length]`` packed into passes that end at ``passes``."""
    device, count = platform.device(), len(tokens)
    layers = list(stage.backbone.numbered_layers())
    caches = [[LayerKV(Extent(tokens.shape[1])) for _ in range(count)] for _ in layers]
    parts, start = [], 0
    for stop in passes:
        where = stage.backbone.packed_positions(torch.arange(start, stop, device=device).repeat(count))
        h = stage.backbone.embed(tokens[:, start:stop].reshape(1, -1).to(device))
        for own, (_, layer) in zip(caches, layers, strict=True):
            h = layer(h, where, PackedCaches(own, [stop - start] * count))
        parts.append(h.view(count, stop - start, -1).transpose(0, 1))
        start = stop
    return torch.cat(parts).cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_over_caches_equal_one_pass(family: str, tokens: Tensor, saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model(family)[0])
    length = tokens.shape[1]
    with torch.no_grad():
        h = stage.backbone.embed(tokens.to(platform.device()))
        whole, _ = stage.run_layers(h, stage.backbone.positions(length), to_end=True)
    for passes in ([length], [10, *range(11, length + 1)], [1, 9, 20, 21, length]):
        torch.testing.assert_close(packed(stage, tokens, passes), whole.cpu(), atol=2e-4, rtol=1e-4)
