"""A cluster, and profiles with round numbers in place of real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from svd_ds.plan.hardware import GPUS, Cluster
from svd_ds.plan.planner import ProfileFn
from svd_ds.plan.step_profile import StepProfile
from tests import profiles


@pytest.fixture
def make_profile() -> Callable[..., StepProfile]:
    """make_profile(policy, field=value, ...)."""
    return profiles.make_profile


@pytest.fixture
def profile_fn() -> ProfileFn:
    return profiles.make_profiles


@pytest.fixture
def cluster() -> Cluster:
    """Two nodes of 8 A100 with 80 GB."""
    gpu = GPUS["a100-80"]
    return Cluster(gpu, 16, 8, gpu.node_network)
