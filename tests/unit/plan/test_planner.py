"""Plan of a run: what it profiles, batch.micro=auto, buckets, and which runs are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest

from svd_ds.compose import compose
from svd_ds.config import RunConfig
from svd_ds.data.config import Shape
from svd_ds.plan.hardware import Cluster
from svd_ds.plan.planner import DoesNotFitError, ProfileFn, make_plan
from svd_ds.plan.step_profile import StepProfile


def test_plan_of_the_configured_run(profile_fn: ProfileFn, cluster: Cluster) -> None:
    plan = make_plan(compose(["batch.size=224", "batch.micro=7"]), cluster, profile_fn, price=2.0)
    (shape,) = plan.shapes
    assert shape.option.micro == 7 and shape.option.recompute == "blocks"
    assert plan.cost.money == pytest.approx(2 * plan.cost.gpu_hours)
    assert plan.cached_cost.gpu_hours < plan.cost.gpu_hours
    plan.check_fits()


def test_run_on_cached_latents_has_the_encoders_of_its_own_profile(
    profile_fn: ProfileFn, cluster: Cluster
) -> None:
    words = ["batch.size=64", "data.latents=true", "data.crop=center", "data.flip=false"]
    (shape,) = make_plan(compose(words), cluster, profile_fn).shapes
    assert shape.cached == shape.option.speed and shape.cached.encoders_s > 0


def test_auto_is_resolved(profile_fn: ProfileFn, cluster: Cluster) -> None:
    plan = make_plan(compose(["batch.size=224", "batch.micro=auto"]), cluster, profile_fn)
    assert plan.shapes[0].option.micro == 7


def test_auto_that_fits_nowhere_is_refused(profile_fn: ProfileFn, cluster: Cluster) -> None:
    tiny = replace(cluster, gpu=replace(cluster.gpu, memory_gib=8.0))
    with pytest.raises(DoesNotFitError, match=r"batch.micro=1 recompute=blocks needs .* has 8 GiB; no micro"):
        make_plan(compose(["batch.size=192", "batch.micro=auto"]), tiny, profile_fn)


def test_run_that_does_not_fit_is_refused(profile_fn: ProfileFn, cluster: Cluster) -> None:
    plan = make_plan(compose(["batch.size=32", "recompute=none"]), cluster, profile_fn)
    with pytest.raises(
        DoesNotFitError, match=r"batch.micro=2 recompute=none needs .* it fits with batch.micro=2"
    ):
        plan.check_fits()


def test_batch_must_be_divisible(profile_fn: ProfileFn, cluster: Cluster) -> None:
    with pytest.raises(ValueError, match=r"batch\.size 24 cannot be split over 16 ranks"):
        make_plan(compose(["batch.size=24"]), cluster, profile_fn)


def test_every_bucket_is_planned_with_its_own_micro_batch(profile_fn: ProfileFn, cluster: Cluster) -> None:
    seen = []

    def record(config: RunConfig, policies: Collection[str], shape: Shape) -> Mapping[str, StepProfile]:
        seen.append((tuple(policies), str(shape)))
        return profile_fn(config, policies, shape)

    buckets = "+data.buckets={14x64x64: 2, 14x128x128: 4}"
    words = ["batch.size=64", "data.num_frames=14", "data.height=64", "data.width=64", buckets]
    plan = make_plan(compose([*words, "batch.micro=auto"]), cluster, record)
    assert seen == [(("blocks",), "14x64x64"), (("blocks",), "14x128x128")]
    assert [shape.option.micro for shape in plan.shapes] == [2, 4]
    assert plan.peak.option.micro == 4 and not plan.options
