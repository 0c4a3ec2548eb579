"""The Adam inside megatron-core's distributed optimizer: torch's (for bfloat16 weights in ``split_adam``), NVIDIA
apex's, or DeepSpeed's in host memory.

megatron-core uses any FusedAdam that it can import. This module chooses one that works on this machine, and passes it
to megatron-core.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from math import sqrt
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from megatron_ee import platform
from megatron_ee.errors import ConfigError
from megatron_ee.parallel.decay import initial_values, keep_initial, pull_
from megatron_ee.parallel.split_adam import SplitAdam

KEY = "optimizer.implementation"
PATIENCE_SECONDS = 10.0
"""Seconds of loading DeepSpeed before a notice that it is being compiled."""


def adam_class(implementation: str, dtype: torch.dtype) -> type[Optimizer]:
    """The class for ``optimizer.implementation`` on this machine, tested on this run's device.

    DeepSpeed's is compiled if necessary, which takes minutes.

    Args:
        dtype: of the weights.

    Raises:
        ConfigError: the named implementation is not installed or does not work.
    """
    if implementation in ("apex", "auto"):
        found = find_apex_adam()
        if not isinstance(found, str):
            return found
        if implementation == "apex":
            raise ConfigError(f"{KEY}: {found}; install NVIDIA apex from its source with CUDA kernels, or use auto")
    if implementation == "deepspeed_cpu":
        load_deepspeed()
        return HostAdam
    return SplitAdam if dtype == torch.bfloat16 else AdamW


def find_apex_adam() -> type[Optimizer] | str:
    """NVIDIA apex's FusedAdam, or the reason why it cannot be used."""
    spec = find_spec("apex")
    if spec is None:
        return "apex is not installed"
    # Looked up without importing: other packages of that name may not even be Python 3.
    places = spec.submodule_search_locations or []
    if PathFinder.find_spec("apex.optimizers", places) is None:
        return f"the apex that is installed, {spec.origin or ', '.join(places)}, is not NVIDIA's package"
    try:
        fused_adam: type[Optimizer] = importlib.import_module("apex.optimizers").FusedAdam
        weight = nn.Parameter(torch.ones(1, device=platform.device()))
        weight.grad = torch.ones_like(weight)
        fused_adam([weight], lr=0.5).step()  # type: ignore[call-arg]
        result = weight.item()
    except Exception as error:  # a broken build raises anything
        return f"apex's FusedAdam does not work here ({_reason(error)})"
    if abs(result - 0.5) > 1e-3:
        return f"apex's FusedAdam does not work here (a test step from 1 to 0.5 gave {result:g})"
    return fused_adam


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
            raise ConfigError(f"{KEY}: DeepSpeed cannot be imported ({_reason(error)}); install it anew") from error
        raise ConfigError(
            f"{KEY}: deepspeed_cpu needs DeepSpeed, which is not installed; pip install 'megatron-ee[deepspeed]'"
        ) from None
    except Exception as error:  # errors of the compiler, of ninja, of loading the result
        raise ConfigError(
            f"{KEY}: DeepSpeed's CPU Adam cannot be compiled or loaded here ({_reason(error)}); "
            "it needs g++ with OpenMP and ninja"
        ) from error
    finally:
        notice.cancel()
    return deepspeed_adam


def _reason(error: Exception) -> str:
    """The most informative line of an error, which may include compiler output."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    telling = [line for line in lines if "error:" in line.lower() or "not found" in line.lower()]
    return f"{type(error).__name__}: {(telling or lines)[0][:300]}"


@contextlib.contextmanager
def inside_megatron(adam: type[Optimizer], config: Any) -> Iterator[None]:
    """While open, megatron-core builds its optimizers with ``adam``.

    Args:
        adam: the inner optimizer.
        config: megatron-core's optimizer configuration; set according to whether ``adam`` keeps its own main weights.
    """
    with platform.quiet_imports():
        from megatron.core import optimizer
        from megatron.core.optimizer import distrib_optimizer
    # Set here, because the options for it check for Transformer Engine and may select megatron-core's own class for
    # host memory, which accepts only CUDA tensors.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = issubclass(adam, HostAdam | SplitAdam)
    with (
        mock.patch.multiple(optimizer, Adam=adam, USING_PYTORCH_OPTIMIZER=adam is AdamW),
        mock.patch.object(distrib_optimizer, "Adam", adam),
    ):
        yield


def prepare_adam(adam: Optimizer, dtype: torch.dtype, towards_initial: float) -> None:
    """Finish an inner optimizer after megatron-core has given it the shards that this rank updates.

    Args:
        dtype: of the model's weights.
        towards_initial: weight decay towards the current values; 0 if there is none.
    """
    if isinstance(adam, HostAdam | SplitAdam):
        adam.allocate()
    if isinstance(adam, AdamW):
        # One pass over memory instead of ten, on CPU and CUDA. megatron-core does not enable it.
        for group in adam.param_groups:
            group["fused"] = True
    if towards_initial:
        keep_initial(adam, towards_initial, dtype, torch.device("cpu") if isinstance(adam, HostAdam) else None)


def pull_to_initial(adam: Optimizer) -> None:
    """Before each step: the decay towards initial values, for implementations that do not do it in their step."""
    if not isinstance(adam, HostAdam | SplitAdam):
        for group in adam.param_groups:
            for main, initial in zip(group["params"], initial_values(group), strict=True):
                pull_(main, initial, group)


def adam_steps(adam: Optimizer) -> int:
    """Number of steps so far, for the bias correction of the next; 0 if there is nothing to update."""
    steps = [int(state["step"]) for state in adam.state.values() if "step" in state]
    steps += [int(group["step"]) for group in adam.param_groups if group["params"] and "step" in group]
    return max(steps, default=0)


def set_adam_steps(adam: Optimizer, steps: int) -> None:
    """Restore a value of ``adam_steps``."""
    if isinstance(adam, AdamW):
        for state in adam.state.values():
            state["step"].fill_(steps)
    else:
        for group in adam.param_groups:
            group["step"] = steps


class HostAdam(Optimizer):
    """DeepSpeed's CPU AdamW for a rank's shards. Float32 main weights, moments and gradients are in host memory.

    megatron-core treats it as a fused Adam that keeps main weights: ``step`` writes the shards. Gradients are given to
    ``receive`` as they are complete. The update runs on ``OMP_NUM_THREADS`` threads.

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
            if (
                shard.dtype != torch.float32
            ):  # rounded on the host, into memory of the gradient, which is not needed now
                sent = main.grad.view(shard.dtype)[: main.numel()].copy_(main)
            shard.copy_(sent, non_blocking=True)
            main.grad = None

    def _set_rates(self, inner: Optimizer) -> None:
        """Count the step and fold Adam's bias correction into the rates.

        DeepSpeed accumulates rounded powers of the betas over steps, but computes them directly after a restart. With
        the correction in the rates, a resumed run equals an uninterrupted one bit for bit.
        """
        for group, its in zip(self.param_groups, inner.param_groups, strict=True):
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            first, second = 1 - beta1 ** group["step"], sqrt(1 - beta2 ** group["step"])
            its["lr"] = group["lr"] * second / first
            its["eps"] = group["eps"] * second
            its["weight_decay"] = group["weight_decay"] * first / second

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """The interface that megatron-core expects of a fused Adam with main weights."""
        return self.state[parameter][name]  # type: ignore[no-any-return]
