"""Everything that is estimated of a run before it starts. Pure: no process group is needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.check import check_run
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import RunConfig
from megatron_ee.exits.registry import check_trains, resolve_init
from megatron_ee.parallel.layout import Layout
from megatron_ee.planning.balance import resolve_layout
from megatron_ee.planning.devices import GPUS_PER_MACHINE, HOST_RESERVED, memory_needed
from megatron_ee.planning.machine import Machine
from megatron_ee.planning.phases import RunTime, run_time
from megatron_ee.planning.plan import RunPlan, make_plan
from megatron_ee.planning.step_time import StepTime, step_time
from megatron_ee.planning.storage import DiskUse, HostMemory, disk_use, host_memory
from megatron_ee.planning.traffic import StageTraffic, stage_traffic
from megatron_ee.planning.workload import Workload, make_workload


@dataclass(frozen=True)
class Estimate:
    """The settings of a run. What follows from them is computed when it is first used.

    Attributes:
        config: checked, its ``model.dtype`` resolved.
        architecture: of the model.
        specs: the exits, by layer.
        layout: of all stages.
        workload: the other settings.
        machine: what times rest on; None if no device was named.
    """

    config: RunConfig
    architecture: Architecture
    specs: tuple[ExitSpec, ...]
    layout: Layout
    workload: Workload
    machine: Machine | None

    @property
    def gpus(self) -> int:
        """Number of processes, one for each GPU."""
        return self.workload.tensor * self.workload.data * len(self.layout.stages)

    @cached_property
    def plan(self) -> RunPlan:
        """Per stage parameters, memory, FLOPs and idle time."""
        return make_plan(self.layout, self.architecture, self.specs, self.workload)

    @property
    def memory(self) -> int:
        """Planned bytes of the rank that needs the most."""
        return max(stage.memory.total for stage in self.plan.stages)

    @cached_property
    def traffic(self) -> tuple[StageTraffic, ...]:
        """Bytes over each kind of link, per stage."""
        stages = range(len(self.layout.stages))
        return tuple(stage_traffic(self.layout, i, self.architecture, self.specs, self.workload) for i in stages)

    @cached_property
    def disk(self) -> DiskUse:
        """What is written."""
        return disk_use(self.config, self.architecture, self.specs, self.workload)

    @cached_property
    def host(self) -> HostMemory:
        """What is in host memory, of all ranks together."""
        return host_memory(self.config, self.architecture, self.specs, self.workload)

    @property
    def processes(self) -> int:
        """Number of processes on one machine."""
        return min(self.gpus, GPUS_PER_MACHINE if self.machine is None else self.machine.devices)

    @property
    def shares_memory(self) -> bool:
        """Whether the device's memory is the host's: on a CPU."""
        return self.machine is not None and not self.machine.accelerator

    @property
    def needed(self) -> float:
        """Bytes that a GPU needs; on a CPU with its share of what is in host memory."""
        return memory_needed(self.memory) + self.shares_memory * self.host.total / self.gpus

    @property
    def host_needed(self) -> float:
        """Bytes that the host of one machine needs."""
        return self.processes * (self.host.total / self.gpus + HOST_RESERVED)

    @cached_property
    def step(self) -> StepTime | None:
        """Time of a step; None without a machine."""
        if self.machine is None:
            return None
        return step_time(self.layout, self.architecture, self.specs, self.workload, self.machine)

    @cached_property
    def run(self) -> RunTime | None:
        """Times of the whole run; None without a machine."""
        if self.machine is None or self.step is None:
            return None
        return run_time(self.config, self.architecture, self.specs, self.layout, self.workload, self.machine, self.step)

    @property
    def kilowatt_hours(self) -> float | None:
        """Energy of all devices at full power; None if the time or the power is unknown."""
        if self.run is None or self.machine is None or self.machine.watts is None:
            return None
        return self.gpus * self.machine.watts * self.run.seconds / 3.6e6

    def price(self, per_hour: float) -> float | None:
        """What the run costs at a price of one GPU for an hour; None if the time is unknown."""
        return None if self.run is None else self.gpus * per_hour * self.run.seconds / 3600


def estimate_run(config: RunConfig, architecture: Architecture, gpus: int, machine: Machine | None) -> Estimate:
    """Check a configuration, whose ``model.dtype`` is resolved, for ``gpus`` processes, and lay out its run.

    Raises:
        ConfigError: as in ``tune``.
    """
    specs = resolve_init(check_run(config, architecture, gpus), architecture)
    check_trains(specs)
    workload = make_workload(config, architecture, gpus, accelerator=machine is None or machine.accelerator)
    taught, kept = workload.top_k > 0, workload.free_running
    layout = resolve_layout(config.parallel, specs, architecture, workload.sequence_length, taught, kept)
    return Estimate(config, architecture, specs, layout, workload, machine)
