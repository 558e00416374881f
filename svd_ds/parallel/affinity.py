"""Binding of a rank's threads to the CPU cores next to its GPU.

Host memory that a GPU reads through the other socket of a machine is slower, and so is the thread that
launches its kernels there. srun binds ranks to cores in order, which need not be the order of the GPUs.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

PCI_DEVICES = Path("/sys/bus/pci/devices")


def bind_to_gpu_cores(device: torch.device, devices: Path = PCI_DEVICES) -> str | None:
    """Bind this process to those of its cores that are next to its GPU. Processes it starts inherit them.

    A process that has no core next to its GPU keeps the ones it has, and so does one on a machine that does
    not say which cores are next to the GPU.

    Args:
        device: GPU of this process.
        devices: sysfs folder of the PCI devices.

    Returns:
        A line for the log; None if all cores of the process are next to the GPU, or nothing is known.
    """
    near = near_cores(device, devices)
    allowed = os.sched_getaffinity(0)
    if near is None or allowed <= near:
        return None
    chosen = allowed & near
    if not chosen:
        return (
            f"the cores of this rank, {describe(allowed)}, are not next to its GPU, {describe(near)} are: "
            "SLURM_CPU_BIND=none in slurm/site.env lets each rank choose its cores"
        )
    # Threads that torch has started already are not bound by binding this one.
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            if os.sched_getaffinity(int(thread)) == allowed:
                os.sched_setaffinity(int(thread), chosen)
    return f"bound to the cores next to its GPU, {describe(chosen)} of {describe(allowed)}"


def near_cores(device: torch.device, devices: Path) -> set[int] | None:
    """Return the cores next to a GPU; None if the machine does not say."""
    gpu = torch.cuda.get_device_properties(device)
    try:
        # Older versions of torch lack these attributes.
        address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"  # type: ignore[attr-defined]
        return parse((devices / address / "local_cpulist").read_text()) or None
    except (AttributeError, OSError, ValueError):
        return None


def parse(cores: str) -> set[int]:
    """Parse the kernel's list of cores: "0-2,7" -> {0, 1, 2, 7}."""
    ranges = [part.partition("-") for part in cores.strip().split(",") if part]
    return {core for first, _, last in ranges for core in range(int(first), int(last or first) + 1)}


def describe(cores: set[int]) -> str:
    """Describe cores as the kernel lists them: {0, 1, 2, 7} -> "0-2,7"."""
    starts = sorted(core for core in cores if core - 1 not in cores)
    ends = sorted(core for core in cores if core + 1 not in cores)
    return ",".join(
        f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True)
    )
