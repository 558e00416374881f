"""Options that fit a GPU: the configured run, and all micro-batches, recompute policies and offloading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from svd_ds.config import RunConfig
from svd_ds.data.batching import BatchSplit, divisors
from svd_ds.plan.hardware import GIB, Cluster
from svd_ds.plan.memory import Memory, plan_gpu_memory
from svd_ds.plan.speed import Speed, plan_speed
from svd_ds.plan.step_profile import StepProfile

FITS, TIGHT, DOES_NOT_FIT = "fits", "tight", "does not fit"
"""Verdicts. Tight: the tensors fit, but not together with the allowance."""


@dataclass(frozen=True)
class Option:
    """One way to run a step, planned."""

    recompute: str
    micro: int
    offload: bool
    memory: Memory
    speed: Speed
    verdict: str

    @property
    def settings(self) -> str:
        """Return the overrides that choose it."""
        offload = " parallel.offload_optimizer=true" if self.offload else ""
        return f"batch.micro={self.micro} recompute={self.recompute}{offload}"


def verdict(memory: Memory, capacity: int) -> str:
    """Return one of FITS, TIGHT, DOES_NOT_FIT.

    Args:
        capacity: memory of the GPU in bytes.
    """
    if memory.total <= capacity:
        return FITS
    return TIGHT if memory.allocated <= capacity else DOES_NOT_FIT


def plan_option(
    config: RunConfig, profile: StepProfile, split: BatchSplit, bucket: int, cluster: Cluster
) -> Option:
    """Plan a step of `config`, with the micro-batch of `split`.

    Args:
        profile: of the shape of `bucket`, with config's recompute policy.
    """
    memory = plan_gpu_memory(config, profile, split.micro[bucket], cluster)
    speed = plan_speed(config, profile, split, bucket, cluster)
    return Option(
        config.recompute,
        split.micro[bucket],
        config.parallel.offload_optimizer,
        memory,
        speed,
        verdict(memory, cluster.gpu.memory_bytes),
    )


def plan_options(config: RunConfig, profiles: Mapping[str, StepProfile], cluster: Cluster) -> list[Option]:
    """Plan every divisor of a rank's share, under every recompute policy, with and without offloading.

    Args:
        profiles: recompute policy -> profile of the main shape.
    """
    share = config.batch.size // cluster.ranks
    options = []
    for offload in (False, True):
        parallel = replace(config.parallel, offload_optimizer=offload)
        for policy, profile in profiles.items():
            variant = replace(config, recompute=policy, parallel=parallel)
            for micro in divisors(share):
                split = BatchSplit(config.batch.size, cluster.ranks, (micro,))
                options.append(plan_option(variant, profile, split, 0, cluster))
    return options


def largest_micro(options: Iterable[Option], config: RunConfig) -> Option | None:
    """Return the option with the largest micro-batch that fits with the configured recompute policy and
    offloading; one clip if that is tight; None if the tensors of one clip do not fit."""
    configured = config.recompute, config.parallel.offload_optimizer
    own = [option for option in options if (option.recompute, option.offload) == configured]
    fitting = [option for option in own if option.verdict == FITS]
    tight = [option for option in own if option.verdict == TIGHT and option.micro == 1]
    return max(fitting or tight, key=lambda option: option.micro, default=None)


def best_option(options: Iterable[Option]) -> Option | None:
    """Return the best option that fits: of those as fast as the fastest, within 1 %, one without offloading,
    and with the least memory. None if none fits."""
    fitting = [option for option in options if option.verdict == FITS]
    top = max((option.speed.clips_per_s for option in fitting), default=0.0)
    fast = [option for option in fitting if option.speed.clips_per_s >= 0.99 * top]
    return min(fast, key=lambda option: (option.offload, option.memory.total), default=None)


def refusal(option: Option, options: Sequence[Option], cluster: Cluster, bucket: str | None = None) -> str:
    """Return the sentence that refuses a run that does not fit: both numbers, and what would fit.

    Args:
        options: alternatives; empty with buckets.
        bucket: shape of the bucket that does not fit; None without buckets.
    """
    gpu, memory = cluster.gpu, option.memory
    allowance = sum(memory.allowance.values()) / GIB
    best, settings = best_option(options), option.settings
    advice = "no micro-batch fits under any recompute policy, with or without parallel.offload_optimizer"
    if bucket is not None:
        settings = settings.replace("batch.micro=", f"data.buckets.{bucket}=")
        advice = "give this bucket fewer clips, or another recompute policy"
    elif best is not None:
        advice = f"it fits with {best.settings}, {best.memory.total / GIB:.1f} GiB"
    return (
        f"the run does not fit: {settings} needs {memory.allocated / GIB:.1f} GiB of tensors and "
        f"{allowance:.1f} GiB besides, and {gpu.name} has {gpu.memory_gib:g} GiB; {advice}"
    )
