"""Profiles of the steps of a config: which request describes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from svd_ds.config import RunConfig
from svd_ds.data.config import Shape
from svd_ds.parallel.env import Env, supports_bf16
from svd_ds.plan.planner import ProfileFn
from svd_ds.plan.profile import profile_in_subprocess
from svd_ds.plan.step_profile import ProfileRequest, StepProfile


def profile_gpu_steps(
    config: RunConfig, policies: Collection[str], shape: Shape
) -> Mapping[str, StepProfile]:
    """Profile a step on a GPU, which has bf16, for each recompute policy; see `planner.ProfileFn`."""
    return _profile(config, policies, shape, "cuda", "bf16")


def profile_cpu_steps(
    config: RunConfig, policies: Collection[str], shape: Shape
) -> Mapping[str, StepProfile]:
    """Profile a step on this machine's CPU, for each recompute policy; see `planner.ProfileFn`."""
    auto = "bf16" if supports_bf16(torch.device("cpu")) else "fp32"
    return _profile(config, policies, shape, "cpu", auto)


def profile_rank_steps(env: Env) -> ProfileFn:
    """Return the function that profiles steps on the device of a rank."""
    return profile_gpu_steps if env.device.type == "cuda" else profile_cpu_steps


def _profile(
    config: RunConfig, policies: Collection[str], shape: Shape, device: str, auto: str
) -> Mapping[str, StepProfile]:
    data = replace(
        config.data, num_frames=shape.num_frames, height=shape.height, width=shape.width, buckets={}
    )
    settings = replace(config, data=data).as_dict()
    precision = auto if config.precision == "auto" else config.precision
    requests = [ProfileRequest(settings, policy, precision, device) for policy in policies]
    return dict(zip(policies, profile_in_subprocess(requests), strict=True))
