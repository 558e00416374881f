"""GPUs and clusters that a plan can be made for: data sheets, assumed shares of the peaks, calibrations.

This is the only place of these numbers. A plan prints each one that it uses, with its source. Shares are
assumptions until a measurement on the GPU is added to CALIBRATIONS.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GIB, GB = 2**30, 1e9
SXM_A100 = "data sheet of the A100 SXM; NVLink by github.com/NVIDIA/nccl-tests/issues/149"
SXM_H100 = "data sheet of the H100 SXM; NVLink by github.com/NVIDIA/nccl-tests/issues/326"
PCIE = "data sheet; PCIe 4.0 x16 without NVLink, assumed at 20 of its 32 GB/s"


@dataclass(frozen=True)
class Shares:
    """Shares of a GPU's peaks that operations reach. All of them are assumed."""

    matmul: float
    conv: float
    attention: float
    bandwidth: float = 0.8

    def of(self, kind: str) -> float:
        """Return the share of the peak FLOP/s that operations of `kind` reach; 1 for kinds without any."""
        shares = {"matmul": self.matmul, "conv": self.conv, "attention": self.attention}
        return shares.get(kind, 1.0)


AMPERE = Shares(matmul=0.70, conv=0.55, attention=0.55)
HOPPER = Shares(matmul=0.60, conv=0.45, attention=0.40)
LAUNCH_S = 4e-6
"""Shortest time of an operation on a GPU, in seconds."""
NODE_NETWORK_SHARE = 0.9
"""Share of the bandwidth of a node's network that collectives reach; assumed."""


@dataclass(frozen=True)
class Gpu:
    """One model of GPU. FLOP/s are dense; bandwidths are in bytes per second."""

    name: str
    """Name of the option --gpu."""
    part: str
    """Part of the name that the driver reports."""
    memory_gib: float
    """Memory that the driver leaves to programs: the total capacity in torch's out-of-memory messages."""
    bf16_flops: float
    tf32_flops: float
    fp32_flops: float
    bandwidth: float
    link: float
    """Bandwidth of all-gather and reduce-scatter within a node, per GPU and direction."""
    node_network: float
    """Bandwidth between nodes, per node and direction, unless --interconnect gives it; assumed."""
    shares: Shares
    source: str

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    def peak_flops(self, kind: str, precision: str) -> float:
        """Return the peak FLOP/s of operations of `kind`. In fp32, torch's defaults hold: TF32 for
        convolutions, and not for products."""
        if precision == "bf16":
            return self.bf16_flops
        return self.tf32_flops if kind == "conv" else self.fp32_flops


# fmt: off
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in (
    Gpu("a100-80", "A100", 79.15, 312e12, 156e12, 19.5e12, 2.039e12, 200e9, 200e9, AMPERE, SXM_A100),
    Gpu("a100-40", "A100", 39.4, 312e12, 156e12, 19.5e12, 1.555e12, 200e9, 200e9, AMPERE, SXM_A100),
    Gpu("a800", "A800", 79.15, 312e12, 156e12, 19.5e12, 2.039e12, 133e9, 200e9, AMPERE,
        "data sheet of the A800 SXM; NVLink: two thirds of the A100's"),
    Gpu("h100-80", "H100", 79.15, 989e12, 494e12, 67e12, 3.35e12, 360e9, 400e9, HOPPER, SXM_H100),
    Gpu("h800", "H800", 79.15, 989e12, 494e12, 67e12, 3.35e12, 160e9, 400e9, HOPPER,
        "data sheet of the H800 SXM; NVLink: four ninths of the H100's"),
    Gpu("h200", "H200", 139.8, 989e12, 494e12, 67e12, 4.8e12, 360e9, 400e9, HOPPER, SXM_H100),
    Gpu("l40s", "L40S", 44.4, 362e12, 183e12, 91.6e12, 0.864e12, 20e9, 12.5e9, AMPERE, PCIE),
    Gpu("a6000", "A6000", 47.4, 155e12, 77.4e12, 38.7e12, 0.768e12, 20e9, 12.5e9, AMPERE, PCIE),
    Gpu("4090", "4090", 23.6, 165e12, 82.6e12, 82.6e12, 1.008e12, 10e9, 12.5e9, AMPERE,
        "data sheet; PCIe 4.0 x16 without peer access, assumed at 10 of its 32 GB/s"),
    Gpu("3090", "3090", 23.6, 71e12, 35.6e12, 35.6e12, 0.936e12, 20e9, 12.5e9, AMPERE, PCIE),
)}
# fmt: on


def find_gpu(name: str) -> Gpu:
    """Return a GPU by the name of the option --gpu.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu is {name}: it must be one of {', '.join(GPUS)}")
    return GPUS[name]


def match_gpu(driver_name: str, memory_gib: float) -> Gpu | None:
    """Return the GPU with a driver's name, such as "NVIDIA A100-SXM4-80GB"; None if it is unknown.

    Args:
        memory_gib: memory that the driver reports; it distinguishes variants of one name.
    """
    found = [gpu for gpu in GPUS.values() if gpu.part in driver_name]
    return min(found, key=lambda gpu: abs(gpu.memory_gib - memory_gib), default=None)


@dataclass(frozen=True)
class Cluster:
    """GPUs of a run, and the network between their nodes."""

    gpu: Gpu
    ranks: int
    gpus_per_node: int
    node_network: float
    """Bandwidth between nodes, in bytes per second, per node and direction."""

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.gpus_per_node)

    @property
    def ranks_per_node(self) -> int:
        return min(self.ranks, self.gpus_per_node)


@dataclass(frozen=True)
class Calibration:
    """One measured step on a GPU, next to its plan."""

    gpu: str
    planned_s: float
    """Seconds of the GPU's computation by the roofline, without calibration."""
    measured_s: float
    source: str
    """Section of docs/benchmarks.md."""


CALIBRATIONS: tuple[Calibration, ...] = ()
"""Measured steps. No GPU figure is measured yet (docs/benchmarks.md)."""


def calibration_factor(gpu: Gpu, calibrations: Iterable[Calibration]) -> float:
    """Return measured over planned seconds on a GPU, as the geometric mean of its calibrations; 1 without."""
    logs = [math.log(c.measured_s / c.planned_s) for c in calibrations if c.gpu == gpu.name]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


@dataclass(frozen=True)
class HostLaw:
    """Time of the host for a micro-step under ZeRO-3, forward and backward, in seconds."""

    base_s: float
    """Time at any number of ranks. It includes the arithmetic of the tiny network it was measured on."""
    per_rank_s: float
    tensors: int
    """Parameter tensors of the network it was measured on; time is proportional to them."""
    source: str

    def seconds(self, tensors: int, ranks: int) -> float:
        """Return the time of a micro-step."""
        return (self.base_s + self.per_rank_s * ranks) * tensors / self.tensors


MEASURED_HOST = "docs/benchmarks.md, ZeRO-3 host cost: CPU time of one core at 2 to 1,024 ranks"
HOST_LAWS = {
    True: HostLaw(base_s=0.41, per_rank_s=0.0, tensors=1332, source=MEASURED_HOST),
    False: HostLaw(base_s=0.45, per_rank_s=0.0103, tensors=1332, source=MEASURED_HOST),
}
"""Host law for each value of parallel.fast_host_loops."""
