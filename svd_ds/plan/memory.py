"""Peak GPU memory of a rank by what it is, and the host memory that offloading takes.

Tensors of the step (activations, gathered blocks, frozen networks) come from a profile of one step, exact for
torch's allocator. Shards and buffers of ZeRO-3 follow from the numbers of elements, as DeepSpeed 0.19.8
allocates them. What torch's allocator does not see is an allowance, and assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from svd_ds.config import RunConfig
from svd_ds.plan.hardware import GIB, Cluster
from svd_ds.plan.step_profile import PHASES, MemoryPoint, StepProfile

OPTIMISER = PHASES[-1]
FP32, BF16 = 4, 2
"""Bytes of an element."""
CONTEXT_BYTES = GIB
"""CUDA context, with the kernels of torch and cuDNN; assumed."""
NCCL_BYTES = 3 * GIB // 2
"""Buffers of NCCL's communicators; assumed."""
WORKSPACE_BYTES = GIB
"""Workspaces of cuDNN and cuBLAS, and the float32 gradient inside attention's backward pass; assumed."""
WORKSPACES, GATHERED_AHEAD = "workspaces", "weights gathered ahead"
"""Parts of the allowance that torch's allocator counts."""
FRAGMENTATION = 0.08
"""Share of the allocated bytes that the allocator holds besides; assumed."""
CPU_PROCESS_BYTES = 3 * GIB // 2
"""Python, torch and the decoding processes of a CPU rank; assumed."""
ASSUMPTIONS = (
    "memory besides tensors is assumed: 1 GiB CUDA context, 1.5 GiB NCCL, 1 GiB workspaces, weights gathered "
    "ahead (up to all), 8 % fragmentation",
)


@dataclass(frozen=True)
class Memory:
    """Memory of one rank at its peak, in bytes."""

    parts: dict[str, int]
    """Tensors on the GPU, by what they are; their sum is torch's peak of allocated memory."""
    allowance: dict[str, int]
    """Memory that torch's allocator does not count, by what it is; assumed."""
    host: dict[str, int]
    """Host memory of a node for offloaded states, by what it is."""
    kept: int
    """Bytes of activations between forward and backward pass."""
    where: str
    """Phase and module of the step's peak."""

    @property
    def allocated(self) -> int:
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        return self.allocated + sum(self.allowance.values())

    @property
    def most_allocated(self) -> int:
        """Return the peak of torch's allocator with the part of the allowance that goes through it."""
        return self.allocated + sum(self.allowance.get(name, 0) for name in (WORKSPACES, GATHERED_AHEAD))


def shard_bytes(config: RunConfig, profile: StepProfile, ranks: int, bf16: bool) -> dict[str, int]:
    """Return the bytes of a rank's ZeRO-3 shards, by what they are.

    Frozen parameters, as under LoRA, have weights only.
    """
    weights = -(-profile.parameters // ranks)
    trained = -(-profile.trained_parameters // ranks)
    averages = len(config.ema.names)
    return {
        f"{'bf16' if bf16 else 'fp32'} weights": weights * (BF16 if bf16 else FP32),
        "fp32 master weights": trained * FP32,
        "Adam's moments": trained * 2 * FP32,
        "fp32 gradients": trained * FP32,
        f"averages ({averages})": trained * averages * FP32,
    }


def buffer_bytes(config: RunConfig, profile: StepProfile, bf16: bool, phase: str) -> dict[str, int]:
    """Return the bytes of DeepSpeed's buffers in a phase of the step.

    The bucket of gradients is there all the time; from it they are copied, rank by rank, to the tensor that
    is reduced. The gathered tensors of a message, for the next block, are copied out of one flat tensor.
    """
    zero = config.parallel
    element = BF16 if zero.reduce_dtype == "bf16" else FP32
    buffers = {"reduce bucket": zero.reduce_bucket * element}
    if phase in ("forward", "backward"):
        ahead = min(zero.prefetch_bucket, profile.largest_block)
        buffers["prefetched block"] = 2 * ahead * (BF16 if bf16 else FP32)
    if phase == "backward":
        buffers["reduced gradients"] = min(zero.reduce_bucket, profile.trained_parameters) * element
    return buffers


def plan_memory(
    config: RunConfig,
    profile: StepProfile,
    micro: int,
    ranks: int,
    ranks_per_node: int,
    *,
    on_gpu: bool = True,
) -> Memory:
    """Plan the peak memory of a rank.

    Args:
        micro: clips of a micro-batch.
        on_gpu: False for ranks on CPUs, which hold everything in host memory.
    """
    bf16 = profile.compute_bytes == BF16
    shards = shard_bytes(config, profile, ranks, bf16)
    host: dict[str, int] = {}
    if config.parallel.offload_optimizer and on_gpu:
        # DeepSpeed offloads accumulated gradients too, and copies them to the optimiser's own.
        moved = [name for name in shards if not name.endswith(" weights") or name.startswith("fp32 master")]
        host = {name: ranks_per_node * shards.pop(name) for name in moved}
        host["fp32 gradients"] *= 2
    elif config.ema.on_host and on_gpu:
        averages = next(name for name in shards if name.startswith("averages"))
        host = {averages: ranks_per_node * shards.pop(averages)}
    buffers = {phase: buffer_bytes(config, profile, bf16, phase) for phase in PHASES}
    peak = step_peak(profile, micro, {phase: sum(sizes.values()) for phase, sizes in buffers.items()})
    parts = shards | buffers[peak.phase] | {"frozen networks": profile.frozen_bytes}
    if profile.extra_bytes:
        parts["discriminator"] = profile.extra_bytes
    parts |= _step_parts(profile, peak, micro)
    allocated = sum(parts.values())
    fragmentation = int(FRAGMENTATION * allocated)
    if not on_gpu:
        allowance = {"process": CPU_PROCESS_BYTES, "fragmentation": fragmentation}
    else:
        gathered = profile.parameters * profile.compute_bytes if ranks > 1 else 0
        allowance = {
            "CUDA context": CONTEXT_BYTES,
            "NCCL": NCCL_BYTES if ranks > 1 else 0,
            WORKSPACES: WORKSPACE_BYTES,
            GATHERED_AHEAD: gathered,
            "fragmentation": fragmentation,
        }
    kept = round(profile.kept.at(micro, profile.chunk))
    return Memory(parts, allowance, host, kept, ": ".join(filter(None, (peak.phase, peak.module))))


def _step_parts(profile: StepProfile, peak: MemoryPoint, micro: int) -> dict[str, int]:
    """Return the bytes of a step's tensors at its peak; blocks other than the one that runs are one part."""
    parts: dict[str, int] = {}
    for part, amount in peak.parts.items():
        name = part
        if part == peak.module:
            name = f"activations of {part}"
        elif part in profile.blocks or "." in part:
            name = "activations kept by other blocks"
        parts[name] = parts.get(name, 0) + round(amount.at(micro, profile.chunk))
    return parts


def step_peak(profile: StepProfile, micro: int, buffers: Mapping[str, int]) -> MemoryPoint:
    """Return the moment of a step at which its tensors and DeepSpeed's buffers take the most memory.

    Args:
        buffers: phase -> bytes of the buffers.
    """
    # The optimiser runs when the activations are gone, on shards that are counted by formula.
    points = [point for point in profile.points if point.phase != OPTIMISER]
    return max(points, key=lambda point: point.total.at(micro, profile.chunk) + buffers[point.phase])


def plan_gpu_memory(config: RunConfig, profile: StepProfile, micro: int, cluster: Cluster) -> Memory:
    """Plan the peak memory of a rank of a cluster of GPUs."""
    return plan_memory(config, profile, micro, cluster.ranks, cluster.ranks_per_node)
