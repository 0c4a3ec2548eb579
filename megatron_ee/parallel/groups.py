"""The process groups of a run. The only module that reads megatron-core's ``parallel_state``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from megatron_ee import platform
from megatron_ee.errors import ConfigError, first_line, shown
from megatron_ee.parallel.agreement import together

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

T = TypeVar("T")
COLLECTIVE_MINUTES = 10.0
"""Time limit of collectives on the device, in minutes. The watchdog notices a lost rank sooner."""
CONTROL_TIMEOUT = timedelta(hours=12)
"""Time limit on the host: others wait this long while the first rank hashes a model from a slow disk. The watchdog
notices a lost rank."""

HOW_TO_LAUNCH = "start with torchrun, which sets it, or unset RANK, WORLD_SIZE and MASTER_ADDR to run a single process"


@dataclass(frozen=True)
class Groups:
    """The process groups of this rank, passed to all code that communicates.

    Attributes:
        collection: argument of megatron-core's layers, data-parallel wrapper and optimizer.
        tensor: ranks that share each layer.
        pipeline: ranks that hold the stages of one model copy, in their order.
        data: ranks that hold the same parameters.
        teacher: the same ranks as ``pipeline``, for teacher messages, which must not queue behind hidden states.
        world: all ranks, on the device.
        control: all ranks, on the host, for decisions and small objects.
        saving: the same as ``control``, for background saves, whose messages must not mix with the main thread's.
    """

    collection: ProcessGroupCollection
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    teacher: dist.ProcessGroup
    world: dist.ProcessGroup
    control: dist.ProcessGroup
    saving: dist.ProcessGroup

    @property
    def rank(self) -> int:
        """Rank among all processes of the run."""
        return self.world.rank()

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and reports."""
        return self.rank == 0

    @cached_property
    def host_tensor(self) -> dist.ProcessGroup:
        """The ranks of ``tensor``, on the host, for small messages. Every rank asks for it, the first time together."""
        return _host_group(self.tensor, self.control)

    @cached_property
    def host_pipeline(self) -> dist.ProcessGroup:
        """As ``host_tensor``, for ``pipeline``."""
        return _host_group(self.pipeline, self.control)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in order of rank."""
        return gather_objects(value, self.control)

    def from_first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the first rank, on every rank. Raises on all ranks if it raises there."""
        answers: list[Any] = []
        self.together(lambda: answers.append(work()) if self.is_main else None)
        answers = answers or [None]
        dist.broadcast_object_list(answers, group=self.control, group_src=0)  # noqa: TID251  between the ranks of one run
        return answers[0]  # type: ignore[no-any-return]

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank and return all results. Raises on all ranks if one raises; see ``agreement``."""
        return together(self.gather, work)


def collective_minutes(silence_seconds: float) -> float:
    """Time limit of collectives in a run whose watchdog waits ``silence_seconds`` for a rank's report.

    It is longer than the watchdog's, so that the lost rank is named first. Torch's own message names only the ranks
    that wait.
    """
    return max(COLLECTIVE_MINUTES, 2 * silence_seconds / 60)


def world_size() -> int:
    """Number of processes that the launcher started; needs no process group. Raises as ``_launched``."""
    return _launched("WORLD_SIZE", 1)


def launched_rank() -> int:
    """Rank that the launcher gave this process; needs no process group. Raises as ``_launched``."""
    return _launched("RANK", 0)


def _launched(variable: str, default: int) -> int:
    """A number that a launcher sets in the environment.

    Raises:
        ConfigError: it is not a number.
    """
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{variable}: must be a whole number in the environment, not {shown(value)}; {HOW_TO_LAUNCH}")
    return int(value)


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's ``value``, in order of rank. ``group`` must be on the host."""
    answers: list[Any] = [None] * group.size()
    dist.all_gather_object(answers, value, group=group)  # noqa: TID251  between the ranks of one run
    return answers


@contextlib.contextmanager
def joined_processes(
    timeout_minutes: float = COLLECTIVE_MINUTES, *, alone: bool = False
) -> Iterator[dist.ProcessGroup]:
    """Connect to the run's other processes. Yields the group of all processes on the host.

    Under torchrun or SLURM the process finds its peers through ``MASTER_ADDR`` and ``RANK``. A process that was started
    alone is a world of one, without any network; ``alone``: in any case.

    Raises:
        ConfigError: a variable that launchers set is missing or invalid, or the processes do not meet.
    """
    platform.quiet_runtime()
    platform.warn_if_busy()
    platform.return_freed_memory()
    if platform.has_accelerator():
        # A launcher may show each process all devices of its machine, or only its own.
        torch.cuda.set_device(_launched("LOCAL_RANK", 0) % torch.cuda.device_count())
    backend, timeout = platform.communication_backend(), timedelta(minutes=timeout_minutes)
    if not alone and "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        _check_launcher()
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ConfigError(
                f"MASTER_ADDR, MASTER_PORT: the processes cannot meet at {where}: {first_line(error)}; if another "
                "program uses this port, choose another one"
            ) from error
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    finally:
        dist.destroy_process_group()


def _check_launcher() -> None:
    """Refuse an environment with which torch's rendezvous fails with a traceback, or waits without end."""
    for variable in ("WORLD_SIZE", "MASTER_PORT"):
        if variable not in os.environ:
            raise ConfigError(f"{variable}: not in the environment, but RANK and MASTER_ADDR are; {HOW_TO_LAUNCH}")
    if launched_rank() >= world_size():
        raise ConfigError(f"RANK: must be below WORLD_SIZE {world_size()}, not {launched_rank()}; {HOW_TO_LAUNCH}")
    if not 0 < (port := _launched("MASTER_PORT", 0)) < 2**16:
        raise ConfigError(f"MASTER_PORT: must be from 1 to 65535, not {port}; {HOW_TO_LAUNCH}")


@contextlib.contextmanager
def model_groups(
    control: dist.ProcessGroup, tensor: int = 1, pipeline: int = 1, timeout_minutes: float = COLLECTIVE_MINUTES
) -> Iterator[Groups]:
    """Form the groups of a run among connected processes. They end with ``joined_processes``.

    ``timeout_minutes``: as in ``joined_processes``, for the groups on the device.
    """
    timeout = timedelta(minutes=timeout_minutes)
    with platform.quiet_imports():
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.process_groups_config import ProcessGroupCollection

    with platform.stand_in():
        try:
            parallel_state.initialize_model_parallel(
                tensor, pipeline, create_gloo_process_groups=False, distributed_timeout_minutes=timeout_minutes
            )
            # The usual tracker needs CUDA generators. A frozen backbone has no dropout.
            tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
            collection = ProcessGroupCollection.use_mpu_process_groups()
            # No embedding is trained, so there are no gradients to sum between the first and the last stage.
            collection.embd = collection.pos_embd = _group_of([dist.get_rank()], control, timeout)
            stages = parallel_state.get_pipeline_model_parallel_group()
            world = dist.group.WORLD
            assert world is not None
            yield Groups(
                collection=collection,
                tensor=parallel_state.get_tensor_model_parallel_group(),
                pipeline=stages,
                data=parallel_state.get_data_parallel_group(),
                teacher=_group_of(dist.get_process_group_ranks(stages), control, timeout),
                world=world,
                control=control,
                saving=dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT),
            )
        finally:
            parallel_state.destroy_model_parallel()


def _host_group(group: dist.ProcessGroup, control: dist.ProcessGroup) -> dist.ProcessGroup:
    """A second group of ``group``'s ranks, on the host."""
    return _group_of(dist.get_process_group_ranks(group), control, CONTROL_TIMEOUT, "gloo")


def _group_of(
    ranks: list[int], control: dist.ProcessGroup, timeout: timedelta, backend: str | None = None
) -> dist.ProcessGroup:
    """The group of ``ranks``, this rank's part of a partition. Every rank calls this.

    torch can form a group with only its members taking part, but it names the group by the number of groups that a rank
    is in. This number may differ, and the members would wait for each other under different names.
    """
    parts = sorted({tuple(part) for part in gather_objects(ranks, control)})
    made = {part: dist.new_group(list(part), backend=backend, timeout=timeout) for part in parts}
    return made[tuple(ranks)]


@contextlib.contextmanager
def process_groups(
    tensor: int = 1, pipeline: int = 1, timeout_minutes: float = COLLECTIVE_MINUTES, *, alone: bool = False
) -> Iterator[Groups]:
    """``joined_processes`` and ``model_groups`` in one, for callers that do nothing in between."""
    with (
        joined_processes(timeout_minutes, alone=alone) as control,
        model_groups(control, tensor, pipeline, timeout_minutes) as groups,
    ):
        yield groups
