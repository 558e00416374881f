"""batch.micro=auto: the largest micro-batch that fits the memory of a rank, by the plan."""

from __future__ import annotations

from dataclasses import replace

import torch

from svd_ds.config import RunConfig
from svd_ds.data.batching import AUTO, BatchConfig, divisors
from svd_ds.parallel.collectives import broadcast_from_rank0
from svd_ds.parallel.env import Env
from svd_ds.plan.hardware import GIB
from svd_ds.plan.memory import Memory, plan_memory
from svd_ds.plan.planner import ProfileFn
from svd_ds.plan.step_profile import StepProfile


def resolve_batch(config: RunConfig, env: Env, profile_fn: ProfileFn) -> tuple[BatchConfig, str]:
    """Replace batch.micro=auto by a number. All ranks call it; rank 0 plans.

    Args:
        profile_fn: profiles a step, in a process of its own: the fake GPU that it needs must not meet the
            real one of this process.

    Returns:
        The batch settings, and a sentence on the choice; empty if there was none.

    Raises:
        SharedError: no micro-batch fits, or the batch cannot be split over the ranks.
    """
    batch = config.batch
    if batch.micro != AUTO:
        return batch, ""
    if config.data.buckets:
        return replace(batch, micro=None), ""  # each bucket has its own
    micro, sentence = broadcast_from_rank0(lambda: _plan(config, env, profile_fn))
    return replace(batch, micro=micro), sentence


def _plan(config: RunConfig, env: Env, profile_fn: ProfileFn) -> tuple[int, str]:
    share = config.batch.share(env.world)
    profile = profile_fn(config, [config.recompute], config.data.shape)[config.recompute]
    on_gpu, capacity = env.device.type == "cuda", rank_memory(env)
    micro, memory = choose_micro(config, profile, share, env.world, env.local_world, capacity, on_gpu)
    if micro is None:
        raise ValueError(
            f"batch.micro is auto: even 1 clip with recompute={config.recompute} needs "
            f"{memory.allocated / GIB:.1f} GiB of tensors, and a rank has {capacity / GIB:.1f} GiB; "
            "tools/plan.py shows what fits"
        )
    return micro, (
        f"batch.micro=auto: {micro} of the {share} clips of a rank at once, planned {memory.total / GIB:.1f} "
        f"of {capacity / GIB:.1f} GiB"
    )


def choose_micro(
    config: RunConfig,
    profile: StepProfile,
    share: int,
    ranks: int,
    ranks_per_node: int,
    capacity: int,
    on_gpu: bool,
) -> tuple[int | None, Memory]:
    """Choose the largest divisor of a rank's share that fits.

    Args:
        share: clips of a step that a rank processes.
        capacity: memory of a rank in bytes.

    Returns:
        The micro-batch, and the memory of its step. It is 1 if only the tensors of that fit, without the
        allowance, and None if they do not fit either.
    """
    for micro in reversed(divisors(share)):
        memory = plan_memory(config, profile, micro, ranks, ranks_per_node, on_gpu=on_gpu)
        if memory.total <= capacity:
            return micro, memory
    return 1 if memory.allocated <= capacity else None, memory


def rank_memory(env: Env) -> int:
    """Return the bytes that a rank may use: all of its GPU, or its share of the available host memory."""
    if env.device.type == "cuda":
        return torch.cuda.get_device_properties(env.device).total_memory
    return available_memory() // env.local_world


def available_memory(meminfo: str = "/proc/meminfo") -> int:
    """Return the memory in bytes that processes can still get on this machine.

    Raises:
        ValueError: the kernel does not report it.
    """
    with open(meminfo) as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    raise ValueError(f"{meminfo} has no MemAvailable: give batch.micro as a number")
