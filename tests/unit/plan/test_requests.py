"""Requests for profiles: precision, shape and device."""

from __future__ import annotations

import pytest
import torch

from svd_ds.compose import compose
from svd_ds.data.config import Shape
from svd_ds.parallel.env import Env, supports_bf16
from svd_ds.plan.requests import profile_cpu_steps, profile_gpu_steps, profile_rank_steps
from svd_ds.plan.step_profile import ProfileRequest
from tests.profiles import record_requests


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ProfileRequest]:
    """All requests for profiles, which are answered with made-up ones."""
    return record_requests(monkeypatch)


def test_each_policy_is_profiled_with_the_shape(asked: list[ProfileRequest]) -> None:
    found = profile_gpu_steps(
        compose(["+data.buckets={8x64x128: 2}", *SHAPE]), ["none", "full"], Shape(8, 64, 128)
    )
    assert {policy: profile.policy for policy, profile in found.items()} == {"none": "none", "full": "full"}
    assert [request.policy for request in asked] == ["none", "full"]
    data = asked[0].config["data"]
    assert (data["num_frames"], data["height"], data["width"], data["buckets"]) == (8, 64, 128, {})


SHAPE = ["data.num_frames=8", "data.height=64", "data.width=128"]


@pytest.mark.parametrize(("precision", "expected"), [("auto", "bf16"), ("fp32", "fp32")])
def test_gpus_have_bf16(asked: list[ProfileRequest], precision: str, expected: str) -> None:
    config = compose([f"precision={precision}"])
    profile_gpu_steps(config, ["blocks"], config.data.shape)
    assert (asked[0].device, asked[0].precision) == ("cuda", expected)


def test_cpus_have_what_this_machine_has(asked: list[ProfileRequest]) -> None:
    config = compose()
    profile_cpu_steps(config, ["blocks"], config.data.shape)
    expected = "bf16" if supports_bf16(torch.device("cpu")) else "fp32"
    assert (asked[0].device, asked[0].precision) == ("cpu", expected)


@pytest.mark.parametrize(("device", "expected"), [("cpu", profile_cpu_steps), ("cuda", profile_gpu_steps)])
def test_ranks_profile_their_own_device(device: str, expected: object) -> None:
    env = Env(0, 1, 0, 1, "127.0.0.1", 0, torch.device(device), "gloo")
    assert profile_rank_steps(env) is expected
