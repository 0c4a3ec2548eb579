"""Differences between megatron-core 0.16 to 0.19, detected by features, not by version."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_ee import platform

with platform.quiet_imports():
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
    from megatron.core.transformer import TransformerConfig


def mark_sharded(parameter: nn.Parameter, dim: int) -> None:
    """Mark a parameter as a tensor-parallel shard, split along ``dim``.

    Gradient norms count unmarked parameters once for all tensor-parallel ranks. megatron-core 0.16 marks a weight only
    when it initialises it, which is turned off here. Later releases always mark it, and fail on a second call.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def without_cuda_graphs() -> dict[str, Any]:
    """Arguments of ``TransformerConfig`` that avoid a warning about its deprecated default."""
    names = ("cuda_graph_modules", "cuda_graph_scope")  # of 0.18 and later, and of 0.16
    return {next(name for name in names if name in TransformerConfig.__dataclass_fields__): []}


def gather_no_weights(wrapper: Any) -> None:
    """Skip the gathering of weights after an update, in a ``DistributedDataParallel`` of one rank.

    Otherwise the rank gathers every weight from itself, for which gloo makes a copy. The optimizer calls different
    methods of the wrapper in different versions; all of them call the bucket groups' method.
    """
    for group in wrapper.bucket_groups:
        group.start_param_sync = lambda *arguments, **options: None
