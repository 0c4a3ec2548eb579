"""The rates that the time of a run rests on: assumed shares of a device's peaks, or measured ones."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ee.planning.devices import (
    BANDWIDTH_SHARE,
    GB,
    GPUS_PER_MACHINE,
    LINK_SHARE,
    NETWORK,
    PRODUCT_SHARE,
    Device,
)


@dataclass(frozen=True)
class Machine:
    """One device and its links, as a run uses them.

    Attributes:
        name: of the device.
        memory: bytes that a run may take on it.
        layers: FLOP/s of the frozen layers.
        exits: FLOP/s of the exits, forward and backward.
        float32: FLOP/s of float32 products, of which a fit's sums are made.
        float64: FLOP/s of float64 products, with which a fit is solved.
        bandwidth: bytes per second of the memory, such as for the optimizer's update.
        link: bytes per second to another device of the same machine, one direction.
        network: bytes per second and device to another machine.
        host_link: bytes per second from and to the host's memory.
        devices: number of devices in one machine.
        watts: power of a device; None if unknown.
        basis: what the rates rest on, a sentence each.
        accelerator: whether the devices are accelerators, with memory of their own, or a CPU.
        host_memory: bytes that all processes of one machine may take in the host's memory; None if unknown.
    """

    name: str
    memory: float
    layers: float
    exits: float
    float32: float
    float64: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    devices: int
    watts: float | None
    basis: tuple[str, ...]
    accelerator: bool = True
    host_memory: float | None = None


def assumed_machine(device: Device, dtype: str) -> Machine:
    """The rates that ``device`` is assumed to reach in ``dtype``."""
    peak = device.bfloat16 if dtype == "bfloat16" else device.float32
    return Machine(
        name=device.name,
        memory=device.memory,
        layers=PRODUCT_SHARE * peak,
        exits=PRODUCT_SHARE * peak,
        float32=PRODUCT_SHARE * device.float32,
        float64=PRODUCT_SHARE * device.float64,
        bandwidth=BANDWIDTH_SHARE * device.bandwidth,
        link=LINK_SHARE * device.link,
        network=LINK_SHARE * NETWORK,
        host_link=LINK_SHARE * device.host_link,
        devices=GPUS_PER_MACHINE,
        watts=device.watts,
        basis=(
            f"{device.name} by its data sheet, of which a run is assumed to reach {PRODUCT_SHARE:.0%} of "
            f"{peak / 1e12:,.4g} TFLOPS in {dtype}, {BANDWIDTH_SHARE:.0%} of {device.bandwidth / GB:,.0f} GB/s of "
            f"memory, {LINK_SHARE:.0%} of {device.link / GB:,.0f} GB/s between GPUs; none of it was measured",
            f"machines of {GPUS_PER_MACHINE} GPUs, between machines {LINK_SHARE:.0%} of {NETWORK / GB:g} GB/s per GPU",
            f"{device.watts:,.0f} W per GPU all the time, without hosts and cooling",
        ),
    )


def group_link(machine: Machine, ranks: int, stride: int) -> float:
    """Bytes per second of the slowest link in a group of ``ranks`` devices whose numbers are ``stride`` apart.

    Groups are laid out as megatron-core does: tensor-parallel ranks are neighbours, then data-parallel ones, then
    stages.
    """
    return machine.link if ranks * stride <= machine.devices else machine.network
