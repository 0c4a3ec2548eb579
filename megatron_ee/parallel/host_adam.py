"""DeepSpeed's CPU AdamW: compiling it, and its use for weights, moments and gradients in host memory."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from math import sqrt
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron_ee import platform
from megatron_ee.errors import ConfigError
from megatron_ee.parallel.decay import initial_values, pull_

KEY = "optimizer.implementation"
PATIENCE_SECONDS = 10.0
"""Seconds of loading DeepSpeed before a notice that it is being compiled."""


def load_deepspeed() -> type[Optimizer]:
    """DeepSpeed's CPU Adam, compiled."""
    where = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    line = (
        "DeepSpeed's CPU Adam is being compiled, once per machine; this takes some minutes. "
        f"If no compiler is running, an earlier one was killed: delete the file cpu_adam/lock under {where}"
    )
    notice = threading.Timer(PATIENCE_SECONDS, lambda: print(line, file=sys.stderr, flush=True))
    notice.daemon = True
    notice.start()
    try:
        settings = {
            # Only its CPU part is needed; for the GPU part it would look for a CUDA compiler.
            "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
            # ninja is installed beside Python, which is not on PATH if the environment is not activated.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        }
        with mock.patch.dict(os.environ, settings):
            deepspeed_adam: type[Optimizer] = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
            importlib.import_module("deepspeed.ops.op_builder").CPUAdamBuilder().load()
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise ConfigError(f"{KEY}: DeepSpeed cannot be imported ({reason_of(error)}); install it anew") from error
        raise ConfigError(
            f"{KEY}: deepspeed_cpu needs DeepSpeed, which is not installed; pip install 'megatron-ee[deepspeed]'"
        ) from None
    except Exception as error:  # errors of the compiler, of ninja, of loading the result
        raise ConfigError(
            f"{KEY}: DeepSpeed's CPU Adam cannot be compiled or loaded here ({reason_of(error)}); "
            "it needs g++ with OpenMP and ninja"
        ) from error
    finally:
        notice.cancel()
    return deepspeed_adam


def reason_of(error: Exception) -> str:
    """The most informative line of an error, which may include compiler output."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    telling = [line for line in lines if "error:" in line.lower() or "not found" in line.lower()]
    return f"{type(error).__name__}: {(telling or lines)[0][:300]}"


class HostAdam(Optimizer):
    """DeepSpeed's CPU AdamW for a rank's shards. Float32 main weights, moments and gradients are in host memory.

    megatron-core treats it as a fused Adam that keeps main weights: ``step`` writes the shards. ``receive`` gets each
    gradient as soon as it is complete. The update runs on ``OMP_NUM_THREADS`` threads.

    Attributes:
        queue: copies to host memory.
        scale: factor of all gradients in the next step.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, **_: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.queue, self.scale = platform.DeviceQueue(), 1.0
        self._mains: dict[Tensor, Tensor] = {}  # by shard, its main weights
        self._gradients: dict[Tensor, Tensor] = {}
        self._buffer = platform.host_buffer(0)  # the memory of both
        self._inner: Optimizer | None = None

    @torch.no_grad()
    def allocate(self) -> None:
        """Allocate the host tensors. The main weights start equal to the shards."""
        sizes = [shard.numel() for group in self.param_groups for shard in group["params"]]
        if not sizes:
            return
        self._buffer = platform.host_buffer(2 * 4 * sum(sizes), f"{KEY} to auto")
        room = iter(self._buffer.view(torch.float32).split([*sizes, *sizes]))
        groups = []
        for group in self.param_groups:
            mains = []
            for shard in group["params"]:
                main = self._mains[shard] = next(room).copy_(shard)
                moments = {name: torch.zeros(shard.numel(), device="cpu") for name in ("exp_avg", "exp_avg_sq")}
                self.state[shard] = {"master_param": main, **moments}
                mains.append(main)
            groups.append({**group, "params": mains, "bias_correction": False})
        self._inner = load_deepspeed()(groups, adamw_mode=True)  # type: ignore[call-arg]
        for shard, main in self._mains.items():
            state = self.state[shard]
            self._inner.state[main] = {"step": 0, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            self._gradients[shard] = next(room).zero_()

    @torch.no_grad()
    def receive(self, shard: Tensor, gradient: Tensor) -> None:
        """Start to copy a shard's gradient to host memory, on the current stream."""
        self._gradients[shard].copy_(gradient, non_blocking=True)
        if shard.dtype == torch.float32:  # these are the model's own weights, which other code may have written
            self._mains[shard].copy_(shard, non_blocking=True)

    def gradient(self, shard: Tensor) -> Tensor:
        """The copy of a shard's gradient, ``[elements]`` float32; complete when ``queue`` has finished."""
        return self._gradients[shard]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the shards. While one is sent to the device, the next one is updated."""
        if self._inner is None:
            return
        self.queue.finish()
        self._set_rates(self._inner)
        starts = [(initial, group) for group in self.param_groups for initial in initial_values(group)]
        for (shard, main), start in zip(self._mains.items(), starts, strict=True):
            main.grad = self._gradients[shard]
            if self.scale != 1.0:
                main.grad.mul_(self.scale)
            pull_(main, *start)
            self._inner.step()  # updates the one parameter with a gradient
            sent = main
            if shard.dtype != torch.float32:
                # Rounded on the host, so that less is sent. The gradient is not needed any more, so its memory is used.
                sent = main.grad.view(shard.dtype)[: main.numel()].copy_(main)
            shard.copy_(sent, non_blocking=True)
            main.grad = None

    def _set_rates(self, inner: Optimizer) -> None:
        """Count the step and fold Adam's bias correction into the rates.

        DeepSpeed accumulates rounded powers of the betas over steps, but computes them directly after a restart. With
        the correction in the rates, a resumed run equals an uninterrupted one bit for bit.
        """
        for group, inner_group in zip(self.param_groups, inner.param_groups, strict=True):
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            first, second = 1 - beta1 ** group["step"], sqrt(1 - beta2 ** group["step"])
            inner_group["lr"] = group["lr"] * second / first
            inner_group["eps"] = group["eps"] * second
            inner_group["weight_decay"] = group["weight_decay"] * first / second

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """The interface that megatron-core expects of a fused Adam with main weights."""
        return self.state[parameter][name]  # type: ignore[no-any-return]
