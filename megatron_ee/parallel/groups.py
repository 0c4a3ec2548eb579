"""The process groups of a run. The only module that reads megatron-core's ``parallel_state``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_ee import platform

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Groups:
    """The process groups of this rank, passed to whatever communicates.

    Attributes:
        collection: megatron-core's collection, as its layers, data-parallel wrapper and optimizer take it.
        tensor: ranks that share each layer.
        pipeline: ranks that hold the stages of one model copy.
        data: ranks that hold the same parameters.
    """

    collection: ProcessGroupCollection
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup

    @property
    def rank(self) -> int:
        """Rank among all processes of the run."""
        return dist.get_rank()

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and reports."""
        return self.rank == 0


def world_size() -> int:
    """Number of processes that the launcher started, before any group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def process_groups(tensor: int = 1, pipeline: int = 1, timeout_minutes: float = 10) -> Iterator[Groups]:
    """Join the run's processes and form their groups; leave them again at the end.

    Started by torchrun or SLURM the process finds its peers through ``MASTER_ADDR`` and ``RANK``; started alone it
    is a world of one, with no network involved.
    """
    with platform.quiet_imports():
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.process_groups_config import ProcessGroupCollection

    platform.quiet_runtime()
    if platform.has_accelerator():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend, timeout = platform.communication_backend(), timedelta(minutes=timeout_minutes)
    with platform.stand_in():
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        try:
            parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
            # Its usual tracker wants CUDA generators; a frozen backbone has no dropout to draw for.
            tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
            yield Groups(
                collection=ProcessGroupCollection.use_mpu_process_groups(),
                tensor=parallel_state.get_tensor_model_parallel_group(),
                pipeline=parallel_state.get_pipeline_model_parallel_group(),
                data=parallel_state.get_data_parallel_group(),
            )
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
