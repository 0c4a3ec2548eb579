"""AdamW for bfloat16 weights with float32 main weights that take 2 additional bytes instead of 4.

A main weight is stored as the model's bfloat16 weight plus a remainder: the 16-bit integer difference between the bit
patterns of the float32 and the bfloat16 value. This is exact (as ``store_param_remainders`` in Transformer Engine and
megatron-core). A tuning step then needs 16 bytes per trained weight, as in float32: weight 2, remainder 2, gradient 4,
moments 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from megatron_ee import platform
from megatron_ee.parallel.decay import initial_values, pull_
from megatron_ee.parallel.tiles import UPDATE_RUN


def join(weight: Tensor, remainder: Tensor, out: Tensor | None = None) -> Tensor:
    """Combine bfloat16 weights and int16 remainders of the same shape to float32 main weights.

    Args:
        weight: bfloat16.
        remainder: int16.
        out: contiguous float32 output; None to allocate it.
    """
    bits = torch.empty_like(remainder, dtype=torch.int32) if out is None else out.view(torch.int32)
    bits.copy_(weight.view(torch.int16)).bitwise_left_shift_(16).add_(remainder)
    return bits.view(torch.float32)


def split_(main: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Split contiguous float32 main weights, which are overwritten, into ``weight`` and ``remainder``. ``join`` is the
    inverse.

    A weight is the bfloat16 value nearest to its main weight; in a tie, the larger in magnitude.
    """
    bits = main.view(torch.int32)
    nearest = (bits + 2**15).bitwise_right_shift_(16)
    weight.view(torch.int16).copy_(nearest)
    remainder.copy_(bits.sub_(nearest.bitwise_left_shift_(16)))


def remainder_of(main: Tensor, weight: Tensor) -> Tensor:
    """int16 remainders of float32 main weights, for bfloat16 weights that were rounded from them in any mode.

    A main weight exactly half a bfloat16 step above its weight exceeds the largest remainder by one. It is changed by
    one float32 ulp.
    """
    nearest = weight.view(torch.int16).int() << 16
    return (main.contiguous().view(torch.int32) - nearest).clamp_(-(2**15), 2**15 - 1).short()


class SplitAdam(Optimizer):
    """torch's fused AdamW on split main weights, which are joined in pieces for the update.

    megatron-core treats it as a fused Adam that keeps main weights: it reads gradients from the shards'
    ``decoupled_grad``, and ``step`` writes the shards.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, **_: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def allocate(self) -> None:
        """Allocate the state. The main weights start equal to the shards."""
        for group in self.param_groups:
            for shard in group["params"]:
                assert shard.dtype == torch.bfloat16, f"a weight of {shard.dtype} has no remainder"
                moments = {name: torch.zeros_like(shard, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
                self.state[shard] = {"master_param": torch.zeros_like(shard, dtype=torch.int16), **moments}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the shards, and count the step."""
        run = max(1, min(UPDATE_RUN, platform.cached_bytes() // 16))
        shards = [shard for group in self.param_groups for shard in group["params"]]
        longest = min(run, max((len(shard) for shard in shards), default=0))
        scratch = torch.empty(longest, dtype=torch.float32, device=platform.device())
        count = torch.empty((), dtype=torch.float32, device=platform.device())  # the update adds one to it
        for group in self.param_groups:
            steps = group.get("step", 0)
            group["step"] = steps + 1
            for shard, initial in zip(group["params"], initial_values(group), strict=True):
                state = self.state[shard]
                wholes = [shard, state["master_param"], shard.decoupled_grad, state["exp_avg"], state["exp_avg_sq"]]
                wholes += [] if initial is None else [initial]
                for parts in zip(*(tensor.split(run) for tensor in wholes), strict=True):
                    _update_(parts, scratch[: len(parts[0])], count.fill_(steps), group)

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """The interface that megatron-core expects of a fused Adam with main weights; ``master_param`` are the
        remainders."""
        return self.state[parameter][name]  # type: ignore[no-any-return]


def _update_(parts: Sequence[Tensor], scratch: Tensor, count: Tensor, group: dict[str, Any]) -> None:
    """Update a piece of weights, remainders, gradients and moments; ``count`` is the number of earlier steps.

    ``parts`` also has the initial values if the group decays towards them.
    """
    weight, remainder, gradient, exp_avg, exp_avg_sq, *initial = parts
    main, (beta1, beta2) = join(weight, remainder, scratch), group["betas"]
    for start in initial:
        pull_(main, start, group)
    adamw(
        [main], [gradient], [exp_avg], [exp_avg_sq], [], [count],
        beta1=beta1, beta2=beta2, eps=group["eps"], lr=group["lr"], weight_decay=group["weight_decay"],
        fused=True, amsgrad=False, maximize=False,
    )  # fmt: skip
    split_(main, weight, remainder)
