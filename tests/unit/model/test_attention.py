"""Rotary frequencies, masks, and passes over a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.architecture import Rope
from megatron_ee.model.attention import Positions, make_positions, rope_frequencies
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


def positions(start: int, stop: int, valid: list[list[int]] | None = None) -> Positions:
    key_valid = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    return make_positions(rope_frequencies(Rope(), 8), torch.float32, start, stop, key_valid)


def visible(mask: Tensor | None) -> list[list[int]]:
    assert mask is not None and mask.shape[:2] == (1, 1)
    return mask[0, 0].int().tolist()


def test_plain_causal_passes_need_no_mask() -> None:
    assert positions(0, 6).mask(None) is None
    assert positions(0, 6).mask(6) is None  # a window that covers all
    assert positions(5, 6).mask(None) is None
    assert positions(0, 1).mask(3) is None
    assert positions(0, 6) is not None and positions(0, 6).causal
    # One query in a pass over a cache sees all; SDPA's own causal order would show it the first key alone.
    assert not positions(5, 6).causal and not positions(3, 6).causal


def test_masks_by_hand() -> None:
    assert visible(positions(0, 4).mask(2)) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible(positions(2, 4).mask(None)) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(positions(2, 4).mask(3)) == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert visible(positions(3, 4).mask(2)) == [[0, 0, 1, 1]]
    # Padding is seen by nobody but itself, on either side.
    assert visible(positions(0, 4, [[0, 0, 1, 1]]).mask(None)) == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    assert visible(positions(0, 4, [[1, 1, 1, 0]]).mask(2)) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_padded_rows_count_their_own_tokens() -> None:
    padded = positions(0, 4, [[0, 0, 1, 1], [1, 1, 1, 0]])
    plain = positions(0, 4)
    assert torch.equal(padded.cos[2:, 0], plain.cos[:2, 0]) and torch.equal(padded.sin[2:, 0], plain.sin[:2, 0])
    assert torch.equal(padded.cos[:3, 1], plain.cos[:3, 0])
    later = positions(3, 4, [[0, 0, 1, 1], [1, 1, 1, 0]])
    assert torch.equal(later.cos, padded.cos[3:])


def test_masks_are_built_once() -> None:
    one = positions(0, 4)
    assert one.mask(2) is one.mask(2) and one.mask(2) is not one.mask(3)


class Kept:
    """A cache that keeps everything."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.pair is not None:
            key, value = (torch.cat(both, dim=2) for both in zip(self.pair, (key, value), strict=True))
        self.pair = key, value
        return key, value


@torch.no_grad()
def hidden(stage: Any, tokens: Tensor, passes: list[int], valid: Tensor | None = None) -> Tensor:
    """h after the last layer, from passes over ``tokens`` that end at ``passes``."""
    device = platform.device()
    tokens = tokens.to(device)
    caches = [Kept() for _ in stage.backbone.numbered_layers()]
    parts, start = [], 0
    for stop in passes:
        seen = None if valid is None else valid[:, :stop].to(device)
        where = stage.backbone.positions(start, stop, seen)
        h = stage.backbone.embed(tokens[:, start:stop])
        for cache, (_, layer) in zip(caches, stage.backbone.numbered_layers(), strict=True):
            h = layer(h, where, cache)
        parts.append(h)
        start = stop
    return torch.cat(parts).cpu()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_over_a_cache_equal_one_pass(
    family: str, padded: bool, tokens: Tensor, saved_model: Any, load_stage: Any
) -> None:
    stage = load_stage(saved_model(family)[0])
    valid = None
    if padded:
        valid = torch.ones(tokens.shape, dtype=torch.bool)
        valid[0, :7] = False
    whole = hidden(stage, tokens, [24], valid)
    for passes in ([10, *range(11, 25)], [1, 9, 20, 21, 24]):
        pieces = hidden(stage, tokens, passes, valid)
        keep = slice(None) if valid is None else valid.t()
        torch.testing.assert_close(pieces[keep], whole[keep], atol=2e-4, rtol=1e-4)
