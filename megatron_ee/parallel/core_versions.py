"""What differs between the releases of megatron-core, 0.16 to 0.19, and is looked for instead of asking the version."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_ee import platform

with platform.quiet_imports():
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
    from megatron.core.transformer import TransformerConfig


def mark_sharded(parameter: nn.Parameter, dim: int) -> None:
    """Mark a parameter as one of the parts that tensor-parallel ranks hold, cut along ``dim``.

    Gradient norms count the other parameters once for all these ranks. megatron-core 0.16 marks a weight only when it
    initialises it, which it is told not to do; later releases always mark it, and fail on a second call.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def without_cuda_graphs() -> dict[str, Any]:
    """Arguments of ``TransformerConfig`` that spare the warning about the default, which is deprecated."""
    names = ("cuda_graph_modules", "cuda_graph_scope")  # of 0.18 and later, and of 0.16
    return {next(name for name in names if name in TransformerConfig.__dataclass_fields__): []}


def gather_no_weights(wrapper: Any) -> None:
    """Let an update leave the weights as they are, in a ``DistributedDataParallel`` of one rank.

    Otherwise that rank gathers every weight from itself, for which gloo makes a copy. Which method of the wrapper the
    optimizer calls differs; all of them end in the bucket groups'.
    """
    for group in wrapper.bucket_groups:
        group.start_param_sync = lambda *arguments, **options: None
