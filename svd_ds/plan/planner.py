"""Plan of a run on a cluster of GPUs: its memory, speed and cost, and the alternatives to its settings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from svd_ds.config import RunConfig
from svd_ds.data.batching import AUTO, BatchSplit
from svd_ds.data.config import Shape
from svd_ds.parallel.recompute import POLICIES
from svd_ds.plan.fit import (
    DOES_NOT_FIT,
    Option,
    largest_micro,
    plan_option,
    plan_options,
    refusal,
)
from svd_ds.plan.hardware import Cluster
from svd_ds.plan.speed import Cost, Speed, plan_cost, plan_speed
from svd_ds.plan.step_profile import StepProfile

ProfileFn = Callable[[RunConfig, Collection[str], Shape], Mapping[str, StepProfile]]
"""Profiles a step of a config, for recompute policies and one shape of clips; returns policy -> profile."""


@dataclass(frozen=True)
class ShapePlan:
    """Plan of the steps whose clips have one shape."""

    shape: Shape
    option: Option
    """Step as configured."""
    cached: Speed
    """Speed with latents and CLIP embeddings from the cache; that of `option` for a decoder."""


class DoesNotFitError(ValueError):
    """A run whose tensors need more memory than a GPU has."""


@dataclass(frozen=True)
class Plan:
    """Plan of a run."""

    config: RunConfig
    cluster: Cluster
    shapes: tuple[ShapePlan, ...]
    """One for each bucket, or one."""
    options: tuple[Option, ...]
    """Alternatives for the main shape; empty with buckets, whose micro-batches are given."""
    profile: StepProfile
    """Profile of the main shape, as configured."""
    cost: Cost
    cached_cost: Cost
    """Cost with the latent cache."""

    @property
    def peak(self) -> ShapePlan:
        """Return the shape with the largest peak of memory."""
        return max(self.shapes, key=lambda shape: shape.option.memory.total)

    def check_fits(self) -> None:
        """Check that the run fits.

        Raises:
            DoesNotFitError: its tensors need more memory than the GPU has; the sentence says what fits.
        """
        option = self.peak.option
        if option.verdict == DOES_NOT_FIT:
            bucket = str(self.peak.shape) if self.config.data.buckets else None
            raise DoesNotFitError(refusal(option, self.options, self.cluster, bucket))


def make_plan(
    config: RunConfig,
    cluster: Cluster,
    profile_fn: ProfileFn,
    policies: Collection[str] = POLICIES,
    price: float | None = None,
) -> Plan:
    """Plan a run.

    Args:
        profile_fn: see `ProfileFn`.
        policies: recompute policies of the alternatives, the configured one among them.
        price: of one GPU for one hour.

    Raises:
        DoesNotFitError: no micro-batch fits with batch.micro=auto.
        ValueError: the batch cannot be split over the ranks.
    """
    options: list[Option] = []
    profiles: list[StepProfile] = []
    if config.data.buckets:
        split = config.batch.split(cluster.ranks, config.data.buckets)
        for shape in config.data.shapes:
            profiles.append(profile_fn(config, [config.recompute], shape)[config.recompute])
    else:
        config.batch.share(cluster.ranks)
        by_policy = profile_fn(config, policies, config.data.shape)
        options = plan_options(config, by_policy, cluster)
        split = _resolved_split(config, options, cluster)
        profiles.append(by_policy[config.recompute])
    shapes = tuple(
        _plan_shape(config, profile, shape, split, bucket, cluster)
        for bucket, (shape, profile) in enumerate(zip(config.data.shapes, profiles, strict=True))
    )
    mean_s, cached_s = (
        sum(times) / len(shapes)
        for times in ([s.option.speed.step_s for s in shapes], [s.cached.step_s for s in shapes])
    )
    return Plan(
        config,
        cluster,
        shapes,
        tuple(options),
        profiles[config.data.shapes.index(config.data.shape)],
        plan_cost(config, mean_s, cluster.ranks, price),
        plan_cost(config, cached_s, cluster.ranks, price),
    )


def _plan_shape(
    config: RunConfig, profile: StepProfile, shape: Shape, split: BatchSplit, bucket: int, cluster: Cluster
) -> ShapePlan:
    option = plan_option(config, profile, split, bucket, cluster)
    # With data.latents the profile has the encoders that remain. A decoder is trained on frames.
    encoders = config.data.latents or config.task == "decoder"
    cached = plan_speed(config, profile, split, bucket, cluster, encoders=encoders)
    return ShapePlan(shape, option, cached)


def _resolved_split(config: RunConfig, options: Sequence[Option], cluster: Cluster) -> BatchSplit:
    """Divide the batch; batch.micro=auto becomes the largest micro-batch that fits.

    Raises:
        DoesNotFitError: none fits.
    """
    if config.batch.micro != AUTO:
        return config.batch.split(cluster.ranks)
    best = largest_micro(options, config)
    if best is None:
        smallest = next(
            option
            for option in options
            if (option.recompute, option.offload, option.micro)
            == (config.recompute, config.parallel.offload_optimizer, 1)
        )
        raise DoesNotFitError(refusal(smallest, options, cluster))
    return replace(config.batch, micro=best.micro).split(cluster.ranks)
