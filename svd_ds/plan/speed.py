"""Time of a training step: the roofline of the GPU, communication, and the host's share.

    micro-step = max(GPU with communication, host)
    step       = micro-steps of a rank x micro-step + optimiser

Operations are counted (svd_ds.plan.profile); shares of the peaks and bandwidths are assumed
(svd_ds.plan.hardware). The result is a lower bound of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

from svd_ds.config import RunConfig
from svd_ds.data.batching import BatchSplit
from svd_ds.plan.hardware import (
    CALIBRATIONS,
    HOST_LAWS,
    LAUNCH_S,
    NODE_NETWORK_SHARE,
    Cluster,
    Gpu,
    calibration_factor,
)
from svd_ds.plan.step_profile import Operation, StepProfile

ADAM_BYTES, AVERAGE_BYTES = 42, 12
"""Bytes moved per element of a shard: AdamW with its gradient's norm and clipping, and one average."""
HOST_LINK, HOST_MEMORY = 20e9, 100e9
"""Bandwidths in bytes per second, assumed: of a GPU to the host, and of a node's memory for its CPUs."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of a micro-step that a rank receives in collectives, and their times in seconds."""

    gathered: float
    """Bytes of all-gathered weights, in forward and backward."""
    reduced: float
    """Bytes of reduce-scattered gradients."""
    forward_s: float
    backward_s: float
    between_nodes: float
    """Bytes that enter each node; 0 within one node."""


@dataclass(frozen=True)
class Speed:
    """Planned times of a step, in seconds, and what follows from them."""

    encoders_s: float
    """Per micro-step, of VAE and CLIP."""
    forward_s: float
    backward_s: float
    traffic: Traffic
    gpu_s: float
    """Micro-step of the GPU, with communication overlapped."""
    not_overlapped_s: float
    """Micro-step of the GPU, if nothing overlaps."""
    host_s: float
    """Micro-step of the host."""
    optimizer_s: float
    """Once a step."""
    num_micro_batches: int
    step_s: float
    clips_per_s: float
    mfu: float | None
    """Model FLOPs utilisation, as svd_ds.training.usage defines it; None if it is not defined."""

    @property
    def bound(self) -> str:
        """Return what limits the micro-step: host, communication or GPU."""
        if self.host_s >= self.gpu_s:
            return "host"
        compute = self.encoders_s + self.forward_s + self.backward_s
        return "communication" if self.gpu_s > 1.001 * compute else "GPU"


def phase_seconds(profile: StepProfile, phase: str, micro: int, gpu: Gpu) -> float:
    """Return the roofline time of a phase, calibrated by measurements where there are any."""
    if phase not in profile.phases:
        return 0.0
    precision = "bf16" if profile.compute_bytes == 2 else "fp32"
    seconds = 0.0
    for operation in profile.phases[phase].operations:
        for clips_or_frames, times in _launches(operation, micro, profile.chunk):
            seconds += times * _operation_seconds(operation, clips_or_frames, gpu, precision)
    return seconds * calibration_factor(gpu, CALIBRATIONS)


def _launches(operation: Operation, micro: int, chunk: int) -> list[tuple[int, int]]:
    """Return how many clips or frames a launch has -> how often there are so many: the autoencoder encodes
    chunks of frames, of which the last may be smaller."""
    if not operation.frames:
        return [(micro, operation.count)]
    chunks, rest = divmod(micro * operation.frames, chunk)
    sizes = [(chunk, chunks * operation.count), (rest, operation.count)]
    return [(size, times) for size, times in sizes if size and times]


def _operation_seconds(operation: Operation, clips_or_frames: int, gpu: Gpu, precision: str) -> float:
    peak = gpu.peak_flops(operation.kind, precision) * gpu.shares.of(operation.kind)
    moved = operation.bytes * clips_or_frames + operation.constant_bytes
    moving_s = moved / (gpu.bandwidth * gpu.shares.bandwidth)
    return max(operation.flops * clips_or_frames / peak, moving_s, LAUNCH_S)


def plan_traffic(config: RunConfig, profile: StepProfile, cluster: Cluster) -> Traffic:
    """Plan the collectives of a micro-step: ring all-gathers and reduce-scatters over all ranks.

    Every link of a ring carries all but one rank's share. The links between nodes are the slower ones; NCCL
    divides the ring over all network cards of a node.
    """
    share = (cluster.ranks - 1) / cluster.ranks
    weights = profile.parameters * profile.compute_bytes * share
    gradients = profile.trained_parameters * (2 if config.parallel.reduce_dtype == "bf16" else 4) * share
    bandwidth = cluster.gpu.link
    if cluster.nodes > 1:
        bandwidth = min(bandwidth, cluster.node_network * NODE_NETWORK_SHARE)
    # With the policy full, hooks of blocks run inside the recomputation too.
    backward_gathers = 2 if config.recompute == "full" else 1
    gathered = (1 + backward_gathers) * weights
    return Traffic(
        gathered=gathered,
        reduced=gradients,
        forward_s=weights / bandwidth,
        backward_s=(backward_gathers * weights + gradients) / bandwidth,
        between_nodes=gathered + gradients if cluster.nodes > 1 else 0.0,
    )


def optimizer_seconds(config: RunConfig, profile: StepProfile, cluster: Cluster) -> float:
    """Return the time of AdamW and the averages on one rank's shards."""
    shard = profile.trained_parameters / cluster.ranks
    averages = len(config.ema.names) * AVERAGE_BYTES
    on_gpu = cluster.gpu.bandwidth * cluster.gpu.shares.bandwidth
    in_host = HOST_MEMORY / cluster.ranks_per_node
    if config.parallel.offload_optimizer:
        # Gradients to the host in fp32, weights back in the compute precision.
        return shard * ((4 + profile.compute_bytes) / HOST_LINK + (ADAM_BYTES + averages) / in_host)
    if config.ema.on_host:
        return shard * (ADAM_BYTES / on_gpu + 4 / HOST_LINK + averages / in_host)
    return shard * (ADAM_BYTES + averages) / on_gpu


def plan_speed(
    config: RunConfig,
    profile: StepProfile,
    split: BatchSplit,
    bucket: int,
    cluster: Cluster,
    *,
    encoders: bool = True,
) -> Speed:
    """Plan the time of a step.

    Args:
        split: division of the batch; its micro-batch of `bucket` is timed.
        encoders: False leaves out VAE and CLIP, which the latent cache saves.
    """
    gpu, micro = cluster.gpu, split.micro[bucket]
    encoders_s, forward_s, backward_s = (
        phase_seconds(profile, phase, micro, gpu) for phase in ("encoders", "forward", "backward")
    )
    encoders_s = encoders_s if encoders else 0.0
    traffic = plan_traffic(config, profile, cluster)
    gpu_s = encoders_s + max(forward_s, traffic.forward_s) + max(backward_s, traffic.backward_s)
    not_overlapped_s = encoders_s + forward_s + backward_s + traffic.forward_s + traffic.backward_s
    host_s = HOST_LAWS[config.parallel.fast_host_loops].seconds(profile.tensors, cluster.ranks)
    optimizer_s = optimizer_seconds(config, profile, cluster)
    num_micro_batches = split.num_micro_batches(bucket)
    step_s = num_micro_batches * max(gpu_s, host_s) + optimizer_s
    clips_per_s = split.size / step_s
    mfu = None
    if config.task == "unet":
        flops_per_clip = 3 * sum(profile.phases["forward"].flops.values())
        mfu = flops_per_clip * clips_per_s / (cluster.ranks * gpu.bf16_flops)
    return Speed(
        encoders_s, forward_s, backward_s, traffic, gpu_s, not_overlapped_s, host_s, optimizer_s,
        num_micro_batches, step_s, clips_per_s, mfu
    )  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Cost of a whole run."""

    days: float
    gpu_hours: float
    money: float | None
    """Cost in the currency of the price; None without a price."""


def plan_cost(config: RunConfig, step_s: float, ranks: int, price: float | None) -> Cost:
    """Plan the cost of all steps, without checkpoints, evaluations, previews and restarts.

    Args:
        price: of one GPU for one hour; None if unknown.
    """
    seconds = config.run.steps * step_s
    hours = seconds * ranks / 3600
    return Cost(seconds / 86400, hours, hours * price if price is not None else None)
