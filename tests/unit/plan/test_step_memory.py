from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from svd_ds.compose import compose
from svd_ds.config import RunConfig
from svd_ds.plan.fake_step import FakeStep
from svd_ds.plan.step_memory import kept_bytes, memory_points
from svd_ds.plan.step_profile import PHASES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    words = "frozen.path=tiny data.num_frames=6 data.height=64 data.width=96 frozen.chunk=4"
    return compose(words.split())


def allocator_peak(step: FakeStep, policy: str) -> float:
    """Largest number of bytes that torch's allocator held during a step, of what the step allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.run(policy)
    recorded = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(recorded, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


@pytest.mark.parametrize("policy", ["none", "blocks", "full"])
def test_peak_is_what_the_allocator_held(policy: str, config: RunConfig) -> None:
    fake = FakeStep(config, CPU, "fp32").run(policy)
    points = memory_points(fake.tracker, 1, config.frozen.chunk)
    expected = {
        phase: max(point.total.at(1, config.frozen.chunk) for point in points if point.phase == phase)
        for phase in PHASES
    }
    real = FakeStep(config, CPU, "fp32", fake=False)
    assert allocator_peak(real, policy) == pytest.approx(max(expected.values()), rel=0.05)
    # The second step takes the results of the first one's encoders.
    later = max(expected["forward"], expected["backward"], expected["optimiser"])
    assert allocator_peak(real, policy) == pytest.approx(later, rel=0.05)


@pytest.mark.parametrize("policy", [pytest.param("none", marks=pytest.mark.slow), "blocks"])
def test_one_clip_gives_the_peak_of_any_micro_batch(policy: str, config: RunConfig) -> None:
    # One clip of 14 frames fills no chunk of the autoencoder, and two clips do. The clips are so large that
    # the kernels of CPUs are the same for one and for four.
    data = replace(config.data, num_frames=14, height=128, width=192)
    step = FakeStep(replace(config, data=data, frozen=replace(config.frozen, chunk=20)), CPU, "fp32")
    points = memory_points(step.run(policy).tracker, 1, 20)
    for clips in (2, 4):
        run = step.run(policy, clips)
        measured = memory_points(run.tracker, clips, 20)
        for phase in ("encoders", "forward", "backward"):
            peaks = [
                max(point.total.at(clips, 20) for point in found if point.phase == phase)
                for found in (points, measured)
            ]
            assert peaks[0] == pytest.approx(peaks[1], rel=0.01), (phase, clips)


def test_parts_sum_to_the_total_and_kept_is_within_the_peak(config: RunConfig) -> None:
    run = FakeStep(config, CPU, "fp32").run("none")
    points = memory_points(run.tracker, 1, config.frozen.chunk)
    for point in points:
        for clips in (1, 3):
            parts = sum(part.at(clips, 4) for part in point.parts.values())
            assert parts == pytest.approx(point.total.at(clips, 4))
    backward = max(point.total.at(1, 4) for point in points if point.phase == "backward")
    assert 0.5 * backward < kept_bytes(run, 1).at(1, 4) < backward
    parts = {name for point in points for name in point.parts}
    assert {"gathered weights", "gradients", "vae"} <= parts
