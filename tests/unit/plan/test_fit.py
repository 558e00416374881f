"""Options: verdicts, the table over micro-batch, policy and offloading, and the choice from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from svd_ds.compose import compose
from svd_ds.config import RunConfig
from svd_ds.parallel.recompute import POLICIES
from svd_ds.plan.fit import (
    DOES_NOT_FIT,
    FITS,
    TIGHT,
    Option,
    best_option,
    largest_micro,
    plan_options,
    refusal,
    verdict,
)
from svd_ds.plan.hardware import GPUS, Cluster
from svd_ds.plan.memory import plan_memory
from svd_ds.plan.step_profile import StepProfile


@pytest.fixture
def config() -> RunConfig:
    """14 clips for each of the 16 ranks of `cluster`."""
    return compose(["batch.size=224"])


@pytest.fixture
def options(config: RunConfig, make_profile: Callable[..., StepProfile], cluster: Cluster) -> list[Option]:
    return plan_options(config, {policy: make_profile(policy) for policy in POLICIES}, cluster)


def test_verdicts(config: RunConfig, make_profile: Callable[..., StepProfile]) -> None:
    memory = plan_memory(config, make_profile(), 1, 16, 8)
    assert verdict(memory, memory.total) == FITS
    assert verdict(memory, memory.total - 1) == verdict(memory, memory.allocated) == TIGHT
    assert verdict(memory, memory.allocated - 1) == DOES_NOT_FIT


def test_table_has_every_divisor_policy_and_offloading(options: list[Option]) -> None:
    assert len(options) == len({option.settings for option in options}) == 4 * 4 * 2
    assert {option.micro for option in options} == {1, 2, 7, 14}
    found = {option.settings: option for option in options}
    assert found["batch.micro=1 recompute=none"].verdict == FITS  # 40 GiB a clip of 79
    assert found["batch.micro=2 recompute=none"].verdict == DOES_NOT_FIT
    assert found["batch.micro=14 recompute=blocks"].verdict == TIGHT
    assert found["batch.micro=14 recompute=full parallel.offload_optimizer=true"].verdict == FITS


def test_more_clips_never_need_less_memory(options: list[Option]) -> None:
    for policy in POLICIES:
        totals = [o.memory.total for o in options if o.recompute == policy and not o.offload]
        assert totals == sorted(totals) and len(totals) == 4


def test_auto_takes_the_largest_micro_batch_of_the_configured_policy(
    config: RunConfig, options: list[Option]
) -> None:
    best = largest_micro(options, config)
    assert best is not None and best.settings == "batch.micro=7 recompute=blocks"
    best = largest_micro(options, replace(config, recompute="none"))
    assert best is not None and best.settings == "batch.micro=1 recompute=none"
    tight = replace(best, micro=1, verdict=TIGHT)
    assert largest_micro([tight, replace(tight, micro=2)], replace(config, recompute="none")) == tight
    assert largest_micro([o for o in options if o.verdict == DOES_NOT_FIT], config) is None


def test_best_option_is_fast_then_small_and_avoids_offloading(options: list[Option]) -> None:
    best = best_option(options)
    assert best is not None and best.verdict == FITS and not best.offload
    top = max(o.speed.clips_per_s for o in options if o.verdict == FITS)
    assert best.speed.clips_per_s >= 0.99 * top
    assert best.memory.total == min(
        o.memory.total
        for o in options
        if o.verdict == FITS and not o.offload and o.speed.clips_per_s >= 0.99 * top
    )
    assert best_option([]) is None


def test_refusal_has_both_numbers_and_what_fits(options: list[Option], cluster: Cluster) -> None:
    wrong = next(o for o in options if o.verdict == DOES_NOT_FIT and o.recompute == "none")
    sentence = refusal(wrong, options, cluster)
    assert sentence.startswith("the run does not fit: batch.micro=2 recompute=none needs 8")
    assert "a100-80 has 79.15 GiB; it fits with batch.micro=" in sentence
    small = replace(cluster, gpu=replace(GPUS["4090"], memory_gib=1.0))
    assert refusal(wrong, [wrong], small).endswith(
        "no micro-batch fits under any recompute policy, with or without parallel.offload_optimizer"
    )
    sentence = refusal(wrong, [], cluster, "14x64x64")
    assert sentence.startswith("the run does not fit: data.buckets.14x64x64=2 recompute=none needs 8")
    assert sentence.endswith("give this bucket fewer clips, or another recompute policy")
