"""Post-hoc averages of another length equal averages that are kept during the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svd_ds.training.ema import EMAConfig, ShardEMA
from svd_ds.weights.posthoc_ema import Profile, posthoc_weights, power_exponent, profile_inner_product
from svd_ds.weights.shards import KEPT_AVERAGES, join_shards, open_checkpoint
from tests.networks import seal

BATCH, NUM_STEPS, EVERY = 4, 400, 20
NUMEL = 37


@pytest.mark.parametrize("length", [0.05, 0.10, 0.25])
def test_exponent_has_the_relative_deviation_it_was_asked_for(length: float) -> None:
    gamma = power_exponent(length)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(length**2)


@pytest.mark.parametrize("a, b", [((1000, 0.1), (1000, 0.05)), ((700, 0.02), (1000, 0.2))])
def test_overlap_is_the_integral_of_the_product(a: tuple[int, float], b: tuple[int, float]) -> None:
    time = (np.arange(200_000) + 0.5) / 200  # up to 1000
    product = np.ones_like(time)
    for samples, length in (a, b):
        gamma = power_exponent(length)
        product *= np.where(time < samples, (gamma + 1) / samples * (time / samples) ** gamma, 0)
    assert profile_inner_product(Profile(*a), Profile(*b)) == pytest.approx(product.sum() / 200, rel=1e-4)


def test_kept_average_has_the_weight_one() -> None:
    kept = [Profile(500, 0.05), Profile(1000, 0.05), Profile(1000, 0.1)]
    weights, misfit = posthoc_weights(kept, Profile(1000, 0.1))
    assert weights == pytest.approx([0, 0, 1], abs=1e-6)
    assert misfit < 1e-6


@pytest.mark.parametrize("length", [0.02, 0.07, 0.25])
def test_two_lengths_at_thirty_moments_give_the_others(length: float) -> None:
    kept = [Profile(moment * 1000, each) for moment in range(1, 31) for each in (0.05, 0.10)]
    weights, misfit = posthoc_weights(kept, Profile(30_000, length))
    assert misfit < 0.05
    assert weights.sum() == pytest.approx(1)


class TestAfterTheRun:
    """A parameter is a random walk; its run keeps averages of two lengths, at changing numbers of ranks."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        generator = torch.Generator().manual_seed(0)
        weights = {"w": torch.zeros(NUMEL)}
        averages = ShardEMA(EMAConfig(lengths=(0.05, 0.10)), weights)
        wanted = ShardEMA(EMAConfig(lengths=(0.07, 0.15)), weights)
        for step in range(1, NUM_STEPS + 1):
            weights["w"] += torch.randn(NUMEL, generator=generator)
            for ema in (averages, wanted):
                ema.update(weights, step * BATCH, BATCH)
            if step % EVERY == 0:
                newest = step > NUM_STEPS - 2 * EVERY
                moment = tmp_path / ("checkpoints" if newest else KEPT_AVERAGES) / f"step-{step:07d}"
                for name in averages.config.names:
                    save(averages.shards(name)["w"], moment / f"ema-{name}", ranks=1 + step // EVERY % 3)
                (moment / "state.json").write_text(json.dumps({"samples": step * BATCH}))
                if newest:
                    save(weights["w"], moment / "unet", ranks=2)
                seal(moment)
        save_file(
            {name.removeprefix("power-"): wanted.shards(name)["w"] for name in wanted.config.names},
            tmp_path / "wanted.safetensors",
        )
        return tmp_path

    @pytest.mark.parametrize("length", ["0.070", "0.150"])
    def test_other_length_equals_one_kept_during_the_run(self, length: str, run: Path) -> None:
        found, expected = read(run, length), load(run, length)
        # Two neighbouring lengths are apart by some of the walk: the error is a small share of that.
        scale = (load(run, "0.070") - load(run, "0.150")).norm()
        assert (found - expected).norm() < 0.02 * scale

    def test_later_checkpoints_have_no_effect(self, run: Path) -> None:
        earlier = run / "checkpoints" / f"step-{NUM_STEPS - EVERY:07d}"
        expected = read(earlier, "0.07")
        shutil.rmtree(run / "checkpoints" / f"step-{NUM_STEPS:07d}")
        assert torch.equal(read(earlier, "0.07"), expected)

    def test_kept_length_is_read(self, run: Path) -> None:
        assert torch.allclose(read(run, "0.1"), read(run, "power-0.100"), rtol=1e-5)

    def test_length_with_a_large_misfit_is_refused(self, run: Path) -> None:
        shutil.rmtree(run / KEPT_AVERAGES)
        with pytest.raises(ValueError, match=r"the 4 averages .* length 0.25 with an error of \d+%, .* 10%"):
            read(run, "0.25")
        with pytest.raises(
            ValueError, match=r"no weights '0.3': .* one of raw, power-0.050, power-0.100, or a length"
        ):
            read(run, "0.3")


def save(flat: Tensor, folder: Path, ranks: int) -> None:
    """Save as a run does: each rank's slice, padded; the padding must have no effect."""
    folder.mkdir(parents=True)
    length = -(-len(flat) // ranks)
    padded = torch.cat([flat, torch.full((length * ranks - len(flat),), torch.nan)])
    for rank in range(ranks):
        shard = {"w": padded[rank * length : (rank + 1) * length].clone()}
        save_file(shard, folder / f"rank-{rank:05d}-of-{ranks:05d}.safetensors")


def read(path: Path, which: str) -> Tensor:
    _, pieces = open_checkpoint(path, "unet", which)
    return join_shards(pieces["w"], torch.Size([NUMEL]))


def load(run: Path, length: str) -> Tensor:
    return load_file(run / "wanted.safetensors")[length]
