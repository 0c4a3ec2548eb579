"""Decoupled weight decay towards the initial values: ``w <- w - lr * weight_decay * (w - w0)``.

The penalty is L2-SP (arXiv 1802.01483), decoupled from the gradient as in AdamW (arXiv 1711.05101). Adam's own decay,
towards zero, is off then. Like Adam's state, the initial values are sharded over the data-parallel ranks. They are kept
in the dtype of the weights, which start from it, so they are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron_ee.parallel.tiles import UPDATE_RUN

INITIAL, RATE = "initial", "initial_decay"
"""Keys of a parameter group that decays: its initial values, and ``weight_decay``."""


def keep_initial(adam: Optimizer, weight_decay: float, dtype: torch.dtype, device: torch.device | None = None) -> None:
    """Copy the current values of the parameters that decay: all but norms and biases.

    Args:
        adam: an inner optimizer of megatron-core's, whose groups have a ``wd_mult``.
        weight_decay: share of the distance that a step at learning rate 1 would go back.
        dtype: of the model's weights.
        device: of the copies; None for the parameters' own.
    """
    for group in adam.param_groups:
        if group["wd_mult"]:
            group[RATE] = weight_decay * group["wd_mult"]
            group[INITIAL] = [shard.detach().to(device, dtype, copy=True) for shard in group["params"]]


def initial_values(group: dict[str, Any]) -> list[Tensor | None]:
    """The initial value of each parameter of a group; None for each if the group does not decay towards them."""
    found: list[Tensor | None] = group.get(INITIAL, [None] * len(group["params"]))
    return found


@torch.no_grad()
def pull_(main: Tensor, initial: Tensor | None, group: dict[str, Any]) -> None:
    """Decay main weights (float32, flat) in place, before the step of their group; nothing without ``initial``."""
    if initial is not None:
        for part, start in zip(main.split(UPDATE_RUN), initial.split(UPDATE_RUN), strict=True):
            part.lerp_(start.float(), group["lr"] * group[RATE])
