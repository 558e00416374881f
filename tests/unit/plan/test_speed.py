"""Time of a step: roofline, communication, host, optimiser; and the cost of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from svd_ds.compose import compose
from svd_ds.config import RunConfig
from svd_ds.data.batching import BatchSplit
from svd_ds.plan import speed as module
from svd_ds.plan.hardware import GPUS, Calibration, Cluster
from svd_ds.plan.speed import optimizer_seconds, phase_seconds, plan_cost, plan_speed, plan_traffic
from svd_ds.plan.step_profile import Operation, PhaseCost, StepProfile

A100 = GPUS["a100-80"]
MakeProfile = Callable[..., StepProfile]


@pytest.fixture
def config() -> RunConfig:
    return compose(["batch.size=64", "run.steps=1000"])


def _one(kind: str, *numbers: float, frames: int = 0) -> dict[str, PhaseCost]:
    count, flops, moved, constant = numbers
    operation = Operation(kind, int(count), flops, moved, constant, frames)
    return {"forward": PhaseCost((operation,), 1, {kind: flops}, moved, constant)}


@pytest.mark.parametrize(
    ("kind", "numbers", "expected"),
    [
        ("matmul", (2, 312e12, 1.0, 0.0), 2 * 3 / 0.70),  # 3 clips, twice
        ("conv", (1, 312e12, 1.0, 0.0), 3 / 0.55),
        ("rest", (1, 0.0, 2.039e12, 0.0), 3 / 0.8),
        ("rest", (1, 0.0, 0.0, 2.039e12), 1 / 0.8),  # weights are read once for all clips
        ("rest", (5, 0.0, 1.0, 0.0), 5 * 4e-6),  # no operation is shorter than its launch
    ],
)
def test_roofline(make_profile: MakeProfile, kind: str, numbers: tuple[float, ...], expected: float) -> None:
    profile = make_profile(phases=_one(kind, *numbers))
    assert phase_seconds(profile, "forward", 3, A100) == pytest.approx(expected)
    assert phase_seconds(profile, "encoders", 3, A100) == 0.0, "a decoder has no such phase"


def test_autoencoder_reads_its_weights_once_a_chunk(make_profile: MakeProfile) -> None:
    profile = make_profile(phases=_one("rest", 1, 0.0, 0.0, 2.039e12, frames=14), chunk=10)
    assert phase_seconds(profile, "forward", 3, A100) == pytest.approx(5 / 0.8), "42 frames are 5 chunks"


def test_products_in_fp32_are_slower(make_profile: MakeProfile) -> None:
    profile = make_profile(phases=_one("matmul", 1, 19.5e12, 1.0, 0.0), compute_bytes=4)
    assert phase_seconds(profile, "forward", 1, A100) == pytest.approx(1 / 0.70)


def test_measured_steps_calibrate_the_roofline(
    make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = phase_seconds(make_profile(), "forward", 1, A100)
    monkeypatch.setattr(module, "CALIBRATIONS", (Calibration("a100-80", 1.0, 1.5, "a section"),))
    assert phase_seconds(make_profile(), "forward", 1, A100) == pytest.approx(1.5 * before)


def test_traffic_within_and_between_nodes(config: RunConfig, make_profile: MakeProfile) -> None:
    inside = plan_traffic(config, make_profile(), Cluster(A100, 8, 8, 12.5e9))
    assert inside.gathered == pytest.approx(2 * 2e9 * 7 / 8)
    assert inside.reduced == pytest.approx(4e9 * 7 / 8)
    assert inside.between_nodes == 0 and inside.forward_s == pytest.approx(2e9 * 7 / 8 / 200e9)
    between = plan_traffic(config, make_profile(), Cluster(A100, 16, 8, 12.5e9))
    assert between.between_nodes == pytest.approx(8e9 * 15 / 16)
    assert between.backward_s == pytest.approx(6e9 * 15 / 16 / (0.9 * 12.5e9))
    assert plan_traffic(config, make_profile(), Cluster(A100, 1, 8, 12.5e9)).backward_s == 0


def test_traffic_follows_the_settings(config: RunConfig, make_profile: MakeProfile, cluster: Cluster) -> None:
    before = plan_traffic(config, make_profile(), cluster)
    halved = replace(config, parallel=replace(config.parallel, reduce_dtype="bf16"))
    assert plan_traffic(halved, make_profile(), cluster).reduced == before.reduced / 2
    full = plan_traffic(replace(config, recompute="full"), make_profile(), cluster)
    assert full.gathered == pytest.approx(1.5 * before.gathered)
    adapters = plan_traffic(config, make_profile(trained_parameters=1000), cluster)
    assert adapters.reduced < 5000 and adapters.gathered == before.gathered


def test_step_is_the_slowest_of_gpu_communication_and_host(
    config: RunConfig, make_profile: MakeProfile, cluster: Cluster
) -> None:
    profile, split = make_profile(), BatchSplit(64, 16, (1,))
    speed = plan_speed(config, profile, split, 0, cluster)
    host_s = speed.host_s
    assert speed.bound == "host" and speed.num_micro_batches == 4
    assert speed.step_s == pytest.approx(4 * host_s + speed.optimizer_s)
    slow_network = replace(cluster, node_network=1e9)
    speed = plan_speed(config, profile, split, 0, slow_network)
    assert speed.bound == "communication" and speed.gpu_s > host_s
    speed = plan_speed(config, replace(profile, tensors=13), split, 0, cluster)
    assert speed.bound == "GPU"
    assert speed.gpu_s == pytest.approx(speed.encoders_s + speed.forward_s + speed.backward_s)
    assert speed.not_overlapped_s == pytest.approx(
        speed.gpu_s + speed.traffic.forward_s + speed.traffic.backward_s
    )


def test_deepspeeds_own_loops_slow_the_host(
    config: RunConfig, make_profile: MakeProfile, cluster: Cluster
) -> None:
    own = replace(config, parallel=replace(config.parallel, fast_host_loops=False))
    split, many = BatchSplit(1536, 384, (4,)), replace(cluster, ranks=384)
    fast, slow = (plan_speed(each, make_profile(), split, 0, many) for each in (config, own))
    assert slow.host_s > 8 * fast.host_s and slow.bound == "host"


def test_mfu_is_three_forward_passes_over_the_peak(
    config: RunConfig, make_profile: MakeProfile, cluster: Cluster
) -> None:
    speed = plan_speed(config, make_profile(), BatchSplit(64, 16, (4,)), 0, cluster)
    assert speed.clips_per_s == pytest.approx(64 / speed.step_s)
    assert speed.mfu == pytest.approx(3 * 20e12 * speed.clips_per_s / (16 * 312e12))


def test_cache_saves_the_encoders(config: RunConfig, make_profile: MakeProfile, cluster: Cluster) -> None:
    split = BatchSplit(64, 16, (4,))
    speed, cached = (
        plan_speed(config, make_profile(), split, 0, cluster, encoders=encoders) for encoders in (True, False)
    )
    assert speed.encoders_s > 0 and cached.encoders_s == 0
    assert speed.gpu_s - cached.gpu_s == pytest.approx(speed.encoders_s)


def test_offloaded_and_host_averages_slow_the_optimiser(
    config: RunConfig, make_profile: MakeProfile, cluster: Cluster
) -> None:
    seconds = optimizer_seconds(config, make_profile(), cluster)
    on_host = replace(config, ema=replace(config.ema, on_host=True))
    offloaded = replace(config, parallel=replace(config.parallel, offload_optimizer=True))
    assert 0 < seconds < optimizer_seconds(on_host, make_profile(), cluster)
    assert optimizer_seconds(on_host, make_profile(), cluster) < optimizer_seconds(
        offloaded, make_profile(), cluster
    )


def test_cost_of_a_run(config: RunConfig) -> None:
    cost = plan_cost(config, 86.4, 16, 2.0)
    assert cost.days == pytest.approx(1.0)
    assert cost.gpu_hours == pytest.approx(16 * 24)
    assert cost.money == pytest.approx(2 * 16 * 24)
    assert plan_cost(config, 86.4, 16, None).money is None
