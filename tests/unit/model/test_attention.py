"""Rotary frequencies, masks, and passes over a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.architecture import Rope
from megatron_ee.inference.kv_cache import Extent, LayerKV, PackedCaches
from megatron_ee.model.attention import (
    Positions,
    make_positions,
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
    return make_positions(rope_frequencies(Rope(), 8), torch.float32, length, key_valid)


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
    assert torch.equal(padded.cos[2:, 0], plain.cos[:2, 0]) and torch.equal(padded.sin[2:, 0], plain.sin[:2, 0])
    assert torch.equal(padded.cos[:3, 1], plain.cos[:3, 0])


def test_packed_positions_are_those_of_the_tokens() -> None:
    packed = packed_positions(rope_frequencies(Rope(), 8), torch.float32, torch.tensor([3, 0, 1]))
    plain = positions(4)
    for ours, theirs in ((packed.cos, plain.cos), (packed.sin, plain.sin)):
        assert torch.equal(ours, theirs[[3, 0, 1]])


def test_masks_are_built_once() -> None:
    one = positions(4)
    assert one.mask(2) is one.mask(2) and one.mask(2) is not one.mask(3)


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
