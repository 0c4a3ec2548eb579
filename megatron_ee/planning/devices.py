"""GPUs by name: what their data sheets say, and the shares of it that a run is assumed to reach.

Products are dense: data sheets also give twice as much, for matrices of which half are zeros. Links are in bytes per
second of one direction; data sheets add up both. GB are 10^9 bytes, of which drivers show a little more.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ee.errors import ConfigError

GB = 10**9

PRODUCT_SHARE = 0.45
"""Share of the peak that products of matrices reach, and what runs between them. Megatron-LM's README reports 41% to
48% for whole training steps on H100."""
BANDWIDTH_SHARE = 0.8
"""Share of the memory bandwidth that operations without products reach."""
LINK_SHARE = 0.7
"""Share of a link's bandwidth that messages and reductions reach."""
GPUS_PER_MACHINE = 8
NETWORK = 12.5 * GB
"""Bytes per second and GPU between machines: 100 Gb/s Ethernet or InfiniBand. Clusters with a 400 Gb/s card for each
GPU have four times as much."""
DISK = 1.0 * GB
"""Bytes per second that the storage of one machine is assumed to read and write."""
HOST_BANDWIDTH = 50 * GB
"""Bytes per second of the host's memory that an optimizer there is assumed to reach."""
RESERVED = 1.0 * GB
"""Bytes that a GPU's CUDA context, kernels, cuBLAS and NCCL take."""
HOST_RESERVED = 2.0 * GB
"""Bytes of host memory that Python and its libraries take in each process."""
FRAGMENTATION = 0.05
"""Share of the planned memory that the allocator loses between tensors."""


@dataclass(frozen=True)
class Device:
    """One kind of GPU.

    Attributes:
        name: in full.
        memory: bytes.
        bandwidth: bytes per second of the memory.
        bfloat16: FLOP/s of dense products with float32 sums.
        float32: FLOP/s outside tensor cores, which torch's default for float32 does not use.
        float64: FLOP/s, in tensor cores if they have it.
        watts: power of the board at most.
        link: bytes per second to another GPU of the same machine, one direction.
        host_link: bytes per second from the host's memory.
    """

    name: str
    memory: float
    bandwidth: float
    bfloat16: float
    float32: float
    float64: float
    watts: float
    link: float
    host_link: float


def _sheet(
    name: str,
    memory: float,
    bandwidth: float,
    flops: tuple[float, float, float],
    watts: float,
    link: float,
    host_link: float,
) -> Device:
    """A device from GB, GB/s, TFLOPS in bfloat16, float32 and float64, W, and GB/s of the two links."""
    bfloat16, float32, float64 = (each * 1e12 for each in flops)
    return Device(name, memory * GB, bandwidth * GB, bfloat16, float32, float64, watts, link * GB, host_link * GB)


PCIE4, PCIE5 = 32, 64  # GB/s of x16, one direction

DEVICES = {
    # NVIDIA H100 Tensor Core GPU data sheet, column SXM: 1,979 TFLOPS with sparsity, NVLink 900 GB/s, PCIe Gen5.
    "h100": _sheet("NVIDIA H100 SXM", 80, 3350, (989, 67, 67), 700, 450, PCIE5),
    # NVIDIA H200 Tensor Core GPU data sheet, column SXM: the processor of the H100 with other memory.
    "h200": _sheet("NVIDIA H200 SXM", 141, 4800, (989, 67, 67), 700, 450, PCIE5),
    # NVIDIA A100 Tensor Core GPU data sheet, column 80GB SXM: NVLink 600 GB/s, PCIe Gen4.
    "a100": _sheet("NVIDIA A100 SXM 80GB", 80, 2039, (312, 19.5, 19.5), 400, 300, PCIE4),
    # The same data sheet, column 40GB.
    "a100-40gb": _sheet("NVIDIA A100 SXM 40GB", 40, 1555, (312, 19.5, 19.5), 400, 300, PCIE4),
    # NVIDIA Blackwell architecture data sheet, an eighth of HGX B200: 36 PFLOPS with sparsity, 600 TFLOPS in float32,
    # 296 in float64, 1.44 TB, 64 TB/s; of each GPU NVLink 1.8 TB/s and 1,000 W.
    "b200": _sheet("NVIDIA B200 SXM", 180, 8000, (2250, 75, 37), 1000, 900, PCIE5),
    # NVIDIA L40S data sheet: 362.05 TFLOPS dense, PCIe Gen4 x16, no NVLink. Float64 is 1/64 of float32 (NVIDIA Ada GPU
    # Architecture whitepaper).
    "l40s": _sheet("NVIDIA L40S", 48, 864, (362, 91.6, 1.43), 350, PCIE4, PCIE4),
    # NVIDIA L4 data sheet: 242 TFLOPS with sparsity, PCIe Gen4 x16. Float64 as for L40S.
    "l4": _sheet("NVIDIA L4", 24, 300, (121, 30.3, 0.47), 72, PCIE4, PCIE4),
    # NVIDIA Ada GPU Architecture whitepaper, appendix A. GeForce GPUs do not reach each other's memory over PCIe, so a
    # message crosses it twice.
    "rtx4090": _sheet("NVIDIA GeForce RTX 4090", 24, 1008, (165.2, 82.6, 1.29), 450, PCIE4 / 2, PCIE4),
    # NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A; without the NVLink bridge of two cards.
    "rtx3090": _sheet("NVIDIA GeForce RTX 3090", 24, 936, (71, 35.6, 0.56), 350, PCIE4 / 2, PCIE4),
    # AMD Instinct MI300X accelerator data sheet, matrix rates; 7 Infinity Fabric links of 128 GB/s in both directions.
    "mi300x": _sheet("AMD Instinct MI300X", 192, 5300, (1307, 163.4, 163.4), 750, 448, PCIE5),
}
"""By the name that ``--gpu`` takes."""


def find_device(name: str, option: str = "--gpu") -> Device:
    """The device of a name.

    Raises:
        ConfigError: it is unknown; names ``option`` and the possible names.
    """
    if name not in DEVICES:
        raise ConfigError(f"{option}: {name!r} is unknown; possible: {', '.join(DEVICES)}")
    return DEVICES[name]


def memory_needed(planned: float) -> float:
    """Bytes of a GPU that a plan of ``planned`` bytes of tensors needs."""
    return planned * (1 + FRAGMENTATION) + RESERVED
