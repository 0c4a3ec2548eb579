"""What the model's tests share: random tokens, positions, and the hidden states that transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """``[2, 24]``, longer than the windows of the tiny models."""
    return torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="session")
def trace() -> Callable[[Any, Tensor], dict[str, list[Tensor]]]:
    """Runs a transformers model; gives h_0 .. h_L and r_1 .. r_L, ``[seq, batch, hidden]``, both indexed by layer."""

    def run(model: Any, tokens: Tensor) -> dict[str, list[Tensor]]:
        seen: dict[str, list[Tensor]] = {"h": [], "r": [torch.empty(0)]}
        handles = []
        for layer in model.model.layers:
            handles.append(layer.register_forward_pre_hook(lambda _, args: seen["h"].append(args[0].transpose(0, 1))))
            handles.append(
                layer.post_attention_layernorm.register_forward_pre_hook(
                    lambda _, args: seen["r"].append(args[0].transpose(0, 1))
                )
            )
        handles.append(
            model.model.norm.register_forward_pre_hook(lambda _, args: seen["h"].append(args[0].transpose(0, 1)))
        )
        with torch.no_grad():
            model(tokens, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen

    return run
