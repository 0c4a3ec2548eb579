"""A stand-in for DeepSpeed, so that this package's half of an optimizer in host memory is tested without it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


class StandInCPUAdam(torch.optim.Optimizer):
    """Of DeepSpeedCPUAdam: its arguments, its state, and that it refuses weights of a device."""

    def __init__(
        self, model_params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, bias_correction: bool = True, adamw_mode: bool = True,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(model_params, {**defaults, "bias_correction": bias_correction})
        assert adamw_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                assert weight.device.type == weight.grad.device.type == "cpu"
                state, (beta1, beta2) = self.state[weight], group["betas"]
                state["step"] += 1
                state["exp_avg"].lerp_(weight.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(weight.grad.square(), 1 - beta2)
                first = 1 - beta1 ** state["step"] if group["bias_correction"] else 1.0
                second = 1 - beta2 ** state["step"] if group["bias_correction"] else 1.0
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                root = (state["exp_avg_sq"] / second).sqrt() + group["eps"]
                weight.addcdiv_(state["exp_avg"], root, value=-group["lr"] / first)


def stand_in_deepspeed(load: Callable[[], Any] = lambda: None) -> dict[str, ModuleType]:
    """Modules by name; ``load`` is what compiling does."""
    ops, builders = ModuleType("deepspeed.ops.adam"), ModuleType("deepspeed.ops.op_builder")
    ops.DeepSpeedCPUAdam = StandInCPUAdam  # type: ignore[attr-defined]
    builders.CPUAdamBuilder = type("CPUAdamBuilder", (), {"load": lambda self: load()})  # type: ignore[attr-defined]
    return {"deepspeed.ops.adam": ops, "deepspeed.ops.op_builder": builders}
