"""The Adam inside megatron-core's distributed optimizer: torch's (for bfloat16 weights in ``split_adam``), NVIDIA
apex's, or DeepSpeed's (``host_adam``).

megatron-core uses any FusedAdam that it can import. This module chooses one that works on this machine, and passes it
to megatron-core.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from megatron_ee import platform
from megatron_ee.errors import ConfigError
from megatron_ee.parallel.decay import initial_values, keep_initial, pull_
from megatron_ee.parallel.host_adam import KEY, HostAdam, load_deepspeed, reason_of
from megatron_ee.parallel.split_adam import SplitAdam


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
        return f"apex's FusedAdam does not work here ({reason_of(error)})"
    if abs(result - 0.5) > 1e-3:
        return f"apex's FusedAdam does not work here (a test step from 1 to 0.5 gave {result:g})"
    return fused_adam


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
