"""A profile of one step with round numbers, in place of a real one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from svd_ds.config import RunConfig
from svd_ds.data.config import Shape
from svd_ds.plan import requests
from svd_ds.plan.hardware import GIB
from svd_ds.plan.step_profile import Amount, MemoryPoint, Operation, PhaseCost, ProfileRequest, StepProfile

KEPT_GIB = {"none": 40, "blocks": 4, "attention": 5, "full": 3}
"""Recompute policy -> activations of a clip."""


def record_requests(monkeypatch: pytest.MonkeyPatch) -> list[ProfileRequest]:
    """Answer requests for profiles with made-up ones; return the list that they are added to."""
    asked: list[ProfileRequest] = []

    def answer(wanted: Sequence[ProfileRequest]) -> list[StepProfile]:
        asked.extend(wanted)
        return [make_profile(request.policy) for request in wanted]

    monkeypatch.setattr(requests, "profile_in_subprocess", answer)
    return asked


def _point(phase: str, module: str, **parts: Amount) -> MemoryPoint:
    total = Amount(
        sum(part.constant for part in parts.values()),
        sum(part.per_clip for part in parts.values()),
        sum(part.per_frame for part in parts.values()),
        max(part.frames for part in parts.values()),
    )
    return MemoryPoint(phase, module, total, parts)


def _cost(flops: float) -> PhaseCost:
    """One product a clip, and one operation that moves 2 GB a clip."""
    operations = (Operation("matmul", 1, flops, 1e6, 1e6, 0), Operation("rest", 1, 0.0, 2e9, 0.0, 0))
    return PhaseCost(operations, 2, {"matmul": flops}, 2e9 + 1e6, 1e6)


def make_profile(policy: str = "blocks", **changes: Any) -> StepProfile:
    """Make a profile of 1,000 million parameters, with the fields in `changes`."""
    kept = Amount(per_clip=KEPT_GIB[policy] * GIB)
    profile = StepProfile(
        policy=policy,
        parameters=1_000_000_000,
        trained_parameters=1_000_000_000,
        tensors=1332,
        trained_tensors=1332,
        blocks={"a": 100_000_000, "b": 10_000_000},
        compute_bytes=2,
        frozen_bytes=GIB,
        extra_bytes=0,
        chunk=14,
        kept=kept,
        points=(
            _point("encoders", "vae", activations=Amount(per_frame=GIB / 2, frames=14)),
            _point("backward", "block a", kept=kept, activations=Amount(constant=GIB, per_clip=GIB)),
            # Of all elements, not of a rank's: it must not count.
            _point("optimiser", "", states=Amount(constant=1000 * GIB)),
        ),
        phases={
            "encoders": PhaseCost((Operation("conv", 3, 1e11, 1e6, 1e6, 14),), 3, {"conv": 42e11}, 42e6, 3e6),
            "forward": _cost(20e12),
            "backward": _cost(60e12),
            "optimiser": _cost(0.0),
        },
        host_reads=(),
        device_errors=(),
        exact=True,
    )
    return replace(profile, **changes)


def make_profiles(config: RunConfig, policies: Collection[str], shape: Shape) -> Mapping[str, StepProfile]:
    """Profiles of any config and shape; a `planner.ProfileFn`."""
    return {policy: make_profile(policy) for policy in policies}
