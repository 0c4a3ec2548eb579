"""The functions of ``inference.sampling`` for a single row, with Python numbers as results."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from megatron_ee.inference import sampling
from megatron_ee.inference.sampling import Proposals, Sampling


def penalised(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """``[V]`` -> ``[V]``."""
    return sampling.penalised(logits[None], [seen], [penalty])[0]


def probabilities(logits: Tensor, settings: Sampling) -> Tensor:
    """``[V]`` -> ``[V]``."""
    return sampling.probabilities(logits[None], [settings])[0]


def draw(p: Tensor, u: float) -> int:
    """Draw a token from ``p`` ``[V]`` with the uniform random number ``u``.

    Raises:
        ValueError: ``p`` is not a distribution.
    """
    token, mass = sampling.draw(p[None], torch.tensor([u], dtype=torch.float64, device=p.device))
    sampling.check_mass(float(mass))
    return int(token)


def verify(target: Tensor, draft: Tensor, tokens: Sequence[int], seed: int, position: int) -> tuple[int, int]:
    """The number of accepted proposals, and the token after them."""
    accepted, found, mass = sampling.verify(target, draft, [Proposals(tokens, seed, position)])
    sampling.check_mass(float(mass))
    return int(accepted), int(found[0, int(accepted)])
