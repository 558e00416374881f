"""The fixed set; tests/distributed/zero3_evaluation.py tests the evaluation on it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from svd_ds.batch import Batch, Clip
from svd_ds.diffusion.noise import NoiseConfig, build_noise_schedule
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner, ConditionerConfig
from svd_ds.sample import TINY
from svd_ds.training.evaluate import (
    NUM_BINS,
    SIGMA_MAX,
    SIGMA_MIN,
    EvaluationConfig,
    as_eval_objective,
    sigma_in_bin,
)
from svd_ds.training.objectives.diffusion import DiffusionObjective


def diffusion_objective(seed: int, noise: NoiseConfig, drop: float) -> DiffusionObjective:
    config = ConditionerConfig(drop_context=drop, drop_concat=drop)
    return DiffusionObjective(
        noise=build_noise_schedule(noise, 64, 64),
        offset_noise=noise.offset_noise,
        autoencoder=Autoencoder.load(TINY),
        conditioner=Conditioner.load(config, TINY),
        seed=seed,
    )


def test_bins_divide_the_sampling_range_evenly() -> None:
    edges = [sigma_in_bin(index, 0.0) for index in range(NUM_BINS)] + [sigma_in_bin(NUM_BINS - 1, 1.0)]
    assert edges[0] == pytest.approx(SIGMA_MIN) and edges[-1] == pytest.approx(SIGMA_MAX)
    ratios = [high / low for low, high in pairwise(edges)]
    assert ratios == pytest.approx([ratios[0]] * NUM_BINS)
    assert sigma_in_bin(3, 1.0) == pytest.approx(sigma_in_bin(4, 0.0))


def test_fixed_set_is_the_same_for_every_run() -> None:
    frames = torch.randint(0, 256, (2, 3, 3, 32, 32)).to(torch.uint8)
    clips = Batch.from_clips(
        [Clip(f"c{i}", i, x, "", {"fps": 6.0, "motion_bucket": 100.0}) for i, x in enumerate(frames)]
    )
    one = as_eval_objective(diffusion_objective(0, NoiseConfig(), drop=0.0)).prepare(clips)
    other = as_eval_objective(
        diffusion_objective(7, NoiseConfig(kind="discrete", offset_noise=0.1), drop=1.0)
    ).prepare(clips)
    assert torch.equal(one.x0_BTChw, other.x0_BTChw)
    assert torch.equal(one.noise_BTChw, other.noise_BTChw)
    for name in ("context_BLD", "scalars_BS", "concat_BTChw"):
        assert torch.equal(getattr(one.cond, name), getattr(other.cond, name)), name
    assert one.cond.context_BLD.abs().sum() > 0, "no condition is dropped"
    alone = as_eval_objective(diffusion_objective(0, NoiseConfig(), drop=0.0)).prepare(clips.select([1]))
    assert torch.allclose(alone.x0_BTChw, one.x0_BTChw[1:], atol=1e-5)
    trained_on = diffusion_objective(0, NoiseConfig(), drop=0.0).prepare(clips)
    assert not torch.equal(trained_on.noise_BTChw, one.noise_BTChw), "the set has other noises than training"


@pytest.mark.parametrize(("field", "value"), [("every", -1), ("clips", 0)])
def test_config_out_of_range_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.{field} "):
        replace(EvaluationConfig(), **{field: value})
